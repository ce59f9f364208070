// @ts-check
/** Two read models and a reactor. One process serves the read models. */

import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { Projector, Worker, connect } from './projectionist.js';

/** The state of each order. */
class Orders extends Projector {
  async setup(db) {
    await db.query(`create table if not exists orders (
      order_id varchar(64) primary key, customer varchar(100) not null,
      amount decimal(12, 2) not null, status varchar(20) not null)`);
  }

  async teardown(db) {
    await db.query('drop table if exists orders');
  }

  async apply({ stream_id, event_type, payload }, db) {
    switch (event_type) {
      case 'OrderPlaced':
        await db.execute("insert into orders values (?, ?, ?, 'placed')", [
          stream_id,
          payload.customer,
          payload.amount,
        ]);
        break;
      case 'OrderPaid':
        await db.execute("update orders set status = 'paid' where order_id = ?", [stream_id]);
        break;
      case 'OrderCancelled':
        await db.execute('delete from orders where order_id = ?', [stream_id]);
        break;
    }
  }
}

/** What each customer has paid. Writes a batch with one statement. */
class Balances extends Projector {
  async setup(db) {
    await db.query(`create table if not exists balances (
      customer varchar(100) primary key, orders int not null, paid decimal(12, 2) not null)`);
  }

  async teardown(db) {
    await db.query('drop table if exists balances');
  }

  async applyAll(events, db) {
    const rows = events.map(({ payload }) => [payload.customer, 1, payload.amount]);
    await db.query(
      `insert into balances values ? on duplicate key update
       orders = orders + values(orders), paid = paid + values(paid)`,
      [rows],
    );
  }
}

/** Sends a receipt for each paid order: here, a file. Its name is the idempotency key. */
class Receipts extends Projector {
  async apply({ event_id, payload }) {
    const directory = process.env.RECEIPTS_DIRECTORY ?? '/tmp';
    const text = `Dear ${payload.customer}, thank you for ${payload.amount}.\n`;
    await writeFile(join(directory, `${event_id}.txt`), text);
  }
}

await new Worker(() => connect(process.env.HANDLER_DATABASE_URL ?? ''), {
  orders: new Orders(),
  balances: new Balances(),
  receipts: new Receipts(),
}).run();
