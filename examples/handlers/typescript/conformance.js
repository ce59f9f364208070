// @ts-check
/** The projector that `projectionist conformance` checks. */

import { setTimeout } from 'node:timers/promises';
import { Projector, Worker, connect } from './projectionist.js';

class Conformance extends Projector {
  async setup(db) {
    await db.query(`create table if not exists conformance (
      seq bigint auto_increment primary key, position bigint unsigned not null)`);
  }

  async teardown(db) {
    await db.query('drop table if exists conformance');
  }

  async apply({ position, event_type }, db) {
    await db.execute('insert into conformance (position) values (?)', [position]);
    if (event_type === 'Poison') throw new Error('a poison event');
    if (event_type === 'Slow') await setTimeout(10_000);
    if (event_type === 'Print') console.log('printed');
  }
}

await new Worker(() => connect(process.env.HANDLER_DATABASE_URL ?? ''), {
  conformance: new Conformance(),
}).run();
