"""Two read models and a reactor. One process serves the read models."""

import os
from pathlib import Path

from projectionist import Projector, Worker, connect


class Orders(Projector):
    """The state of each order."""

    def setup(self, db):
        db.execute(
            """create table if not exists orders (
               order_id varchar(64) primary key, customer varchar(100) not null,
               amount decimal(12, 2) not null, status varchar(20) not null)"""
        )

    def teardown(self, db):
        db.execute("drop table if exists orders")

    def apply(self, event, db):
        order, payload = event["stream_id"], event["payload"]
        match event["event_type"]:
            case "OrderPlaced":
                values = (order, payload["customer"], payload["amount"])
                db.execute("insert into orders values (%s, %s, %s, 'placed')", values)
            case "OrderPaid":
                db.execute("update orders set status = 'paid' where order_id = %s", (order,))
            case "OrderCancelled":
                db.execute("delete from orders where order_id = %s", (order,))


class Balances(Projector):
    """What each customer has paid. Writes a batch with one statement."""

    def setup(self, db):
        db.execute(
            """create table if not exists balances (
               customer varchar(100) primary key, orders int not null,
               paid decimal(12, 2) not null)"""
        )

    def teardown(self, db):
        db.execute("drop table if exists balances")

    def apply_all(self, events, db):
        payloads = (event["payload"] for event in events)
        db.executemany(
            """insert into balances values (%s, 1, %s) on duplicate key update
               orders = orders + values(orders), paid = paid + values(paid)""",
            [(payload["customer"], payload["amount"]) for payload in payloads],
        )


class Receipts(Projector):
    """Sends a receipt for each paid order: here, a file. Its name is the idempotency key."""

    def apply(self, event, db):
        payload = event["payload"]
        text = f"Dear {payload['customer']}, thank you for {payload['amount']}.\n"
        directory = Path(os.environ.get("RECEIPTS_DIRECTORY", "/tmp"))
        (directory / f"{event['event_id']}.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    Worker(
        lambda: connect(os.environ["HANDLER_DATABASE_URL"]),
        {"orders": Orders(), "balances": Balances(), "receipts": Receipts()},
    ).run()
