/**
 * A client for Projectionist: reads batches of events from standard input, applies each in one
 * transaction, and answers on standard output. docs/handlers.md describes the protocol.
 * projectionist.d.ts has the types.
 */

import { createInterface } from 'node:readline';
import mysql from 'mysql2/promise';

const PROTOCOL = 1;

/** A deadlock, a lock wait timeout, a lost or a killed connection: a retry may succeed. */
const TRANSIENT = new Set([1205, 1213, 1927, 2006, 2013, 3101, 4031]);
const LOST = new Set(['PROTOCOL_CONNECTION_LOST', 'ECONNRESET', 'ECONNREFUSED', 'EPIPE', 'ETIMEDOUT']);

/** Whether the driver had closed the connection before the statement was sent. */
const isClosed = (error) => error.fatal === true && error.errno === undefined;

export class RetryLater extends Error {
  constructor(message, seconds) {
    super(message);
    this.seconds = seconds;
  }
}

class EventFailed extends Error {
  constructor(position, cause) {
    super(cause.message, { cause });
    this.position = position;
  }
}

export class Projector {
  async setup(_db) {}

  async teardown(_db) {}

  async apply(_event, _db) {
    throw new Error('override apply or applyAll');
  }

  async applyAll(events, db) {
    for (const event of events) {
      try {
        await this.apply(event, db);
      } catch (error) {
        throw new EventFailed(event.position, error);
      }
    }
  }
}

export class Worker {
  #connect;
  #projectors;
  #db;

  constructor(connect, projectors) {
    this.#connect = connect;
    this.#projectors = projectors;
  }

  async run() {
    // Only answers may be written to standard output. `console.log` becomes a log line.
    const write = process.stdout.write.bind(process.stdout);
    process.stdout.write = process.stderr.write.bind(process.stderr);
    for await (const line of createInterface({ input: process.stdin })) {
      const message = JSON.parse(line);
      const answer = await this.#answer(message).catch((error) => this.#failure(error));
      write(`${JSON.stringify({ ...answer, id: message.id })}\n`);
    }
    this.#db?.destroy();
  }

  async #answer(message) {
    const projector = this.#projectors[message.name];
    if (!projector) throw new Error(`there is no projector ${message.name} here`);
    switch (message.type) {
      case 'hello':
        return { type: 'hello', protocol: PROTOCOL };
      case 'setup':
        await projector.setup(await this.#connection());
        return { type: 'done' };
      case 'teardown':
        await projector.teardown(await this.#connection());
        return { type: 'done' };
      case 'batch':
        return this.#apply(projector, message);
      default:
        throw new Error(`unknown message ${message.type}`);
    }
  }

  /**
   * The fence and the projector's writes are one transaction. A batch without a fence is applied at
   * least once: the event's id is the idempotency key.
   */
  async #apply(projector, batch) {
    const db = await this.#connection();
    await db.beginTransaction();
    if (batch.fence !== null) {
      const [moved] = await db.query(batch.fence);
      if (moved.affectedRows !== 1) {
        await db.rollback();
        return { type: 'not_mine' };
      }
    }
    await projector.applyAll(batch.events, db);
    await db.commit();
    return { type: 'done' };
  }

  #failure(error) {
    const answer = { type: 'failed', message: error.message };
    if (error instanceof EventFailed) {
      answer.event = error.position;
      error = error.cause;
    }
    if (error instanceof RetryLater) {
      answer.retry_after = error.seconds;
    } else if (TRANSIENT.has(error.errno) || LOST.has(error.code) || isClosed(error)) {
      answer.retry_after = 0.1;
    }
    // Closing the connection rolls back, also if the connection is lost.
    this.#db?.destroy();
    this.#db = undefined;
    return answer;
  }

  async #connection() {
    if (!this.#db) {
      const db = await this.#connect();
      // An idle connection that is lost must not be used again.
      db.on('error', () => {
        if (this.#db === db) this.#db = undefined;
      });
      this.#db = db;
    }
    return this.#db;
  }
}

/** Opens a connection for a URL like mysql://user:password@host:3306/database. */
export const connect = (url) => mysql.createConnection({ uri: url, charset: 'utf8mb4' });
