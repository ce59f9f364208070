"""The projector that `projectionist conformance` checks."""

import os
import time

from projectionist import Projector, Worker, connect


class Conformance(Projector):
    def setup(self, db):
        db.execute(
            """create table if not exists conformance (
               seq bigint auto_increment primary key, position bigint unsigned not null)"""
        )

    def teardown(self, db):
        db.execute("drop table if exists conformance")

    def apply(self, event, db):
        db.execute("insert into conformance (position) values (%s)", (event["position"],))
        match event["event_type"]:
            case "Poison":
                raise ValueError("a poison event")
            case "Slow":
                time.sleep(10)
            case "Print":
                print("printed")


Worker(
    lambda: connect(os.environ["HANDLER_DATABASE_URL"]), {"conformance": Conformance()}
).run()
