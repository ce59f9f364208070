"""A client for Projectionist: reads batches of events from standard input, applies each in one
transaction, and answers on standard output. docs/handlers.md describes the protocol.
"""

import json
import os
import sys
from urllib.parse import unquote, urlsplit

import pymysql

PROTOCOL = 1

# A deadlock, a lock wait timeout, a lost or a killed connection: a retry may succeed.
TRANSIENT = {1205, 1213, 1927, 2003, 2006, 2013, 3101, 4031}


class RetryLater(Exception):
    """Raised by a projector that cannot apply its event now, although the event is not the cause."""

    def __init__(self, message, seconds):
        super().__init__(message)
        self.seconds = seconds


class EventFailed(Exception):
    """Says at which event a batch failed. The cause is the projector's own error."""

    def __init__(self, position):
        super().__init__(f"event {position} failed")
        self.position = position


class Projector:
    def setup(self, db):
        """Creates the tables. Must be harmless to repeat."""

    def teardown(self, db):
        """Removes what setup created. Must be harmless to repeat."""

    def apply(self, event, db):
        """Applies one event in the open transaction. Must not commit."""
        raise NotImplementedError

    def apply_all(self, events, db):
        """Applies the events of a batch, in order. Override it to write many with one statement."""
        for event in events:
            try:
                self.apply(event, db)
            except Exception as error:
                raise EventFailed(event["position"]) from error


class Worker:
    """Serves projectors, by name. `connect` opens a connection to the events' MySQL server."""

    def __init__(self, connect, projectors):
        self.connect = connect
        self.projectors = projectors
        self.connection = None

    def run(self):
        """Answers messages until standard input is closed."""
        # Only answers may be written to standard output. `print` becomes a log line.
        answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for line in sys.stdin.buffer:
            message = json.loads(line)
            try:
                answer = self.answer(message)
            except Exception as error:
                answer = self.failure(error)
            print(json.dumps({**answer, "id": message["id"]}), file=answers, flush=True)

    def answer(self, message):
        projector = self.projectors.get(message["name"])
        if projector is None:
            raise LookupError(f"there is no projector {message['name']} here")
        match message["type"]:
            case "hello":
                return {"type": "hello", "protocol": PROTOCOL}
            case "setup":
                projector.setup(self.cursor())
            case "teardown":
                projector.teardown(self.cursor())
            case "batch":
                return self.apply(projector, message)
            case other:
                raise ValueError(f"unknown message {other}")
        return {"type": "done"}

    def apply(self, projector, batch):
        """The fence and the projector's writes are one transaction. A batch without a fence is
        applied at least once: the event's id is the idempotency key."""
        db = self.cursor()
        db.connection.begin()
        if batch["fence"] is not None and db.execute(batch["fence"]) != 1:
            db.connection.rollback()
            return {"type": "not_mine"}
        projector.apply_all(batch["events"], db)
        db.connection.commit()
        return {"type": "done"}

    def failure(self, error):
        answer = {"type": "failed"}
        if isinstance(error, EventFailed):
            answer["event"] = error.position
            error = error.__cause__
        answer["message"] = f"{type(error).__name__}: {error}"
        if isinstance(error, RetryLater):
            answer["retry_after"] = error.seconds
        elif isinstance(error, pymysql.Error) and error.args and error.args[0] in TRANSIENT:
            answer["retry_after"] = 0.1
        # Closing the connection rolls back, also if the connection is lost.
        if self.connection is not None:
            self.connection.close() if self.connection.open else None
            self.connection = None
        return answer

    def cursor(self):
        if self.connection is None:
            self.connection = self.connect()
        return self.connection.cursor()


def connect(url):
    """Opens a connection for a URL like mysql://user:password@host:3306/database."""
    parts = urlsplit(url)
    return pymysql.connect(
        host=parts.hostname,
        port=parts.port or 3306,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        database=parts.path.lstrip("/"),
        charset="utf8mb4",
    )
