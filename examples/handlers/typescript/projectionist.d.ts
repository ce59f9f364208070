import type { Connection } from 'mysql2/promise';

export interface Event<Payload = any> {
  position: number;
  event_id: string;
  stream_id: string;
  stream_version: number;
  event_type: string;
  /** RFC 3339, in UTC. */
  recorded_at: string;
  payload: Payload;
  metadata: any;
}

/** Thrown by a projector that cannot apply its event now, although the event is not the cause. */
export class RetryLater extends Error {
  constructor(message: string, seconds: number);
  readonly seconds: number;
}

export class Projector {
  /** Creates the tables. Must be harmless to repeat. */
  setup(db: Connection): Promise<void>;
  /** Removes what setup created. Must be harmless to repeat. */
  teardown(db: Connection): Promise<void>;
  /** Applies one event in the open transaction. Must not commit. */
  apply(event: Event, db: Connection): Promise<void>;
  /** Applies the events of a batch, in order. Override it to write many with one statement. */
  applyAll(events: Event[], db: Connection): Promise<void>;
}

export class Worker {
  /** Serves projectors, by name. `connect` opens a connection to the events' MySQL server. */
  constructor(connect: () => Promise<Connection>, projectors: Record<string, Projector>);
  /** Answers messages until standard input is closed. */
  run(): Promise<void>;
}

export function connect(url: string): Promise<Connection>;
