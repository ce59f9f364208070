//! The conformance kit: runs a handler through the cases of the protocol, on a scratch database.
//!
//! The handler serves the projector `conformance`, version 1. Its setup creates the table
//! `conformance`, it stores the position of each event there, and it treats some event types
//! specially: see `docs/handlers.md`.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use async_trait::async_trait;
use sqlx::{AssertSqlSafe, MySqlConnection};
use time::OffsetDateTime;
use tokio::time::{sleep, timeout};

use super::process::{CommandSpec, Process};
use super::protocol::{PROTOCOL, Request, Response};
use super::stderr::CurrentProjector;
use crate::database::Database;
use crate::ledger::{Ledger, fence_sql};
use crate::model::event::{Event, Position, RecordedEvent};
use crate::model::external::ExternalBatch;
use crate::model::lifecycle::Stage;
use crate::model::projector::{Projector, ProjectorId};
use crate::model::registry::{RegisteredProjector, Registry};

/// The name of the projector that the handler serves, and of its table.
const NAME: &str = "conformance";

/// How long a handler may take for one message.
const TIME_LIMIT: Duration = Duration::from_secs(20);

/// How long a handler may take to commit a small batch.
const COMMIT_LIMIT: Duration = Duration::from_secs(5);

/// How long a handler may work at an event of type `Slow` before it is killed.
const SLOW: Duration = Duration::from_millis(500);

/// How long a handler may take to exit after the end of its input.
const EXIT_LIMIT: Duration = Duration::from_secs(5);

/// The cases, in the order in which they run.
pub(crate) const CASES: &[&str] = &[
    "hello and setup, which may be repeated",
    "an unknown projector is refused",
    "a batch is applied, and the position moves",
    "an empty batch moves the position",
    "a repeated batch is not mine, and changes nothing",
    "a batch for another status is not mine, and changes nothing",
    "a failing event fails the batch, names its position, and stores nothing",
    "the process goes on after a failure",
    "large and unusual text arrives",
    "printed text is not an answer",
    "killed in the middle of a batch, nothing is stored, and the batch can be repeated",
    "killed after the commit and before the answer, the repeated batch is not mine",
    "of two processes with one batch, one applies it",
    "after a lost connection, the batch is applied or failed with retry_after",
    "the process exits at the end of its input",
    "teardown drops the table",
];

/// The case after which a process has exited.
const END_OF_INPUT: usize = 14;

/// The projector, as the ledger has it.
struct ConformanceProjector;

#[async_trait]
impl Projector for ConformanceProjector {
    fn name(&self) -> &str {
        NAME
    }

    async fn handle(&self, _: &Event, _: &mut MySqlConnection) -> anyhow::Result<()> {
        bail!("the handler's process applies the events")
    }
}

/// A run of the kit.
pub(crate) struct Conformance {
    spec: CommandSpec,
    database: Database,
    registry: Registry,
    /// The positions that the handler should have stored so far.
    applied: Vec<u64>,
    /// The process of the last case, if it has kept the rules.
    idle: Option<Handler>,
}

/// A greeted process.
struct Handler {
    process: Process,
    last_id: u64,
}

impl Conformance {
    /// Registers the projector in a scratch database with our tables.
    ///
    /// # Errors
    /// If the database fails.
    pub(crate) async fn new(database: Database, spec: CommandSpec) -> anyhow::Result<Self> {
        let registry = Registry::new().with(ConformanceProjector)?;
        let kit = Conformance { spec, database, registry, applied: Vec::new(), idle: None };
        Ledger::new(&kit.database).register(kit.projector(), Position::START).await?;
        Ok(kit)
    }

    /// Runs one case. The error says which rule the handler breaks. A process that has kept the
    /// rules so far serves the next case, too.
    pub(crate) async fn run(&mut self, case: usize) -> anyhow::Result<()> {
        let mut handler = match self.idle.take() {
            Some(handler) => handler,
            None => self.start().await?,
        };
        self.run_with(&mut handler, case).await?;
        self.idle = Some(handler).filter(|_| case != END_OF_INPUT);
        Ok(())
    }

    async fn run_with(&mut self, handler: &mut Handler, case: usize) -> anyhow::Result<()> {
        match case {
            0 => self.set_up(handler).await,
            1 => refuse_unknown_projector(handler).await,
            2 => self.apply_batch(handler, &["Good", "Good", "Good"]).await,
            3 => self.apply_batch(handler, &[]).await,
            4 => self.repeat_batch(handler).await,
            5 => self.refuse_other_status(handler).await,
            6 => self.fail(handler).await,
            7 => {
                self.fail(handler).await?;
                self.apply_batch(handler, &["Good"]).await
            }
            8 => self.apply_unusual_text(handler).await,
            9 => self.apply_batch(handler, &["Print", "Good"]).await,
            10 => self.kill_in_the_middle(handler).await,
            11 => self.kill_after_the_commit(handler).await,
            12 => self.apply_with_two_processes(handler).await,
            13 => self.lose_connection(handler).await,
            END_OF_INPUT => {
                let has_exited = handler.process.close(EXIT_LIMIT).await;
                ensure!(has_exited, "it did not exit within {} s", EXIT_LIMIT.as_secs());
                Ok(())
            }
            _ => self.tear_down(handler).await,
        }
    }

    fn projector(&self) -> &RegisteredProjector {
        self.registry.iter().next().map_or_else(|| unreachable!("it was added"), AsRef::as_ref)
    }

    /// The events of these types after the projector's position.
    async fn events(&self, types: &[&str]) -> anyhow::Result<(Position, Vec<Event>)> {
        let after = self.position().await?;
        let event = |(index, event_type): (usize, &&str)| {
            let position = after.get() + 1 + index as u64;
            Event::from(RecordedEvent {
                position: Position::new(position),
                event_id: format!("conformance-{position}"),
                stream_id: "conformance".into(),
                stream_version: position,
                event_type: (*event_type).into(),
                recorded_at: OffsetDateTime::UNIX_EPOCH,
                payload: format!("{{\"number\": {position}}}"),
                metadata: None,
            })
        };
        Ok((after, types.iter().enumerate().map(event).collect()))
    }

    async fn set_up(&self, handler: &mut Handler) -> anyhow::Result<()> {
        for _ in 0..2 {
            let setup = |id| Ok(Request::Setup { id, name: NAME, version: 1 });
            handler.send(setup).await?.into_done()?;
        }
        self.check(Position::START).await
    }

    async fn apply_batch(&mut self, handler: &mut Handler, types: &[&str]) -> anyhow::Result<()> {
        let (after, events) = self.events(types).await?;
        let through = Position::new(after.get() + types.len().max(1) as u64);
        let answer = self.send(handler, Stage::Boot, after, through, &events).await?;
        self.expect_done(answer, through, &events).await
    }

    async fn repeat_batch(&mut self, handler: &mut Handler) -> anyhow::Result<()> {
        let (after, events) = self.events(&["Good", "Good"]).await?;
        let through = last(&events);
        let answer = self.send(handler, Stage::Boot, after, through, &events).await?;
        self.expect_done(answer, through, &events).await?;
        let answer = self.send(handler, Stage::Boot, after, through, &events).await?;
        self.expect_not_mine(answer, through).await
    }

    async fn refuse_other_status(&mut self, handler: &mut Handler) -> anyhow::Result<()> {
        let (after, events) = self.events(&["Good"]).await?;
        // The projector is booting, and this fence is for a live one.
        let answer = self.send(handler, Stage::Play, after, last(&events), &events).await?;
        self.expect_not_mine(answer, after).await
    }

    async fn fail(&self, handler: &mut Handler) -> anyhow::Result<()> {
        let (after, events) = self.events(&["Good", "Poison", "Good"]).await?;
        let answer = self.send(handler, Stage::Boot, after, last(&events), &events).await?;
        let Response::Failed { event, retry_after, .. } = answer else {
            bail!("it answered {answer:?} to a batch with a failing event")
        };
        let failing = events[1].position().get();
        ensure!(event == Some(failing), "`event` is {event:?}, and event {failing} failed");
        ensure!(retry_after.is_none(), "`retry_after` is set, and the error is permanent");
        self.check(after).await
    }

    async fn apply_unusual_text(&mut self, handler: &mut Handler) -> anyhow::Result<()> {
        let (after, events) = self.events(&["Good", "Good", "Good"]).await?;
        let long = format!("{{\"text\": \"{}\"}}", "ł\\n".repeat(300_000));
        let deep = format!("{}1{}", "[".repeat(90), "]".repeat(90));
        let payloads = ["{\"a\":\n\"\\u2028 😀 'quoted' \\\"\\\\\"}".to_owned(), long, deep];
        let events: Vec<Event> = events
            .iter()
            .zip(payloads)
            .map(|(event, payload)| {
                Event::from(RecordedEvent {
                    position: event.position(),
                    event_id: event.event_id().into(),
                    stream_id: "Überweisung \"7\"".into(),
                    stream_version: event.stream_version(),
                    event_type: "Good".into(),
                    recorded_at: OffsetDateTime::UNIX_EPOCH,
                    payload,
                    metadata: Some("null".into()),
                })
            })
            .collect();
        let through = last(&events);
        let answer = self.send(handler, Stage::Boot, after, through, &events).await?;
        self.expect_done(answer, through, &events).await
    }

    async fn kill_in_the_middle(&mut self, handler: &mut Handler) -> anyhow::Result<()> {
        let (after, events) = self.events(&["Good", "Slow"]).await?;
        let through = last(&events);
        let sent = self.send(handler, Stage::Boot, after, through, &events);
        if let Ok(answer) = timeout(SLOW, sent).await {
            bail!("it answered {:?} before it had slept at an event of type Slow", answer?);
        }
        *handler = self.start().await?;
        self.check(after).await?;
        let (_, events) = self.events(&["Good", "Good"]).await?;
        let answer = self.send(handler, Stage::Boot, after, through, &events).await?;
        self.expect_done(answer, through, &events).await
    }

    async fn kill_after_the_commit(&mut self, handler: &mut Handler) -> anyhow::Result<()> {
        let (after, events) = self.events(&["Good", "Good"]).await?;
        let through = last(&events);
        let id = handler.next_id();
        let line = self.line(id, Stage::Boot, after, through, &events)?;
        handler.process.write(&line).await?;
        let committed = async {
            while self.position().await? != through {
                sleep(Duration::from_millis(5)).await;
            }
            anyhow::Ok(())
        };
        timeout(COMMIT_LIMIT, committed).await.context("it did not commit the batch")??;
        *handler = self.start().await?;
        self.applied.extend(positions(&events));
        let answer = self.send(handler, Stage::Boot, after, through, &events).await?;
        self.expect_not_mine(answer, through).await
    }

    async fn apply_with_two_processes(&mut self, handler: &mut Handler) -> anyhow::Result<()> {
        let mut other = self.start().await?;
        let (after, events) = self.events(&["Good"; 50]).await?;
        let through = last(&events);
        let answers = tokio::try_join!(
            self.send(handler, Stage::Boot, after, through, &events),
            self.send(&mut other, Stage::Boot, after, through, &events),
        )?;
        let is_right = matches!(
            answers,
            (Response::Done { .. }, Response::NotMine { .. })
                | (Response::NotMine { .. }, Response::Done { .. })
        );
        ensure!(is_right, "the two processes answered {answers:?}");
        self.applied.extend(positions(&events));
        self.check(through).await
    }

    async fn lose_connection(&mut self, handler: &mut Handler) -> anyhow::Result<()> {
        let (after, events) = self.events(&["Good"]).await?;
        let through = last(&events);
        let answer = self.send(handler, Stage::Boot, after, through, &events).await?;
        self.expect_done(answer, through, &events).await?;
        self.kill_sessions().await?;
        let (after, events) = self.events(&["Good"]).await?;
        let through = last(&events);
        for _ in 0..3 {
            let answer = self.send(handler, Stage::Boot, after, through, &events).await?;
            match answer {
                Response::Failed { retry_after: Some(_), .. } => self.check(after).await?,
                Response::Failed { message, .. } => {
                    bail!("`retry_after` is not set after a lost connection: {message}")
                }
                answer => return self.expect_done(answer, through, &events).await,
            }
        }
        bail!("it does not connect again after its connection was lost")
    }

    async fn tear_down(&mut self, handler: &mut Handler) -> anyhow::Result<()> {
        for _ in 0..2 {
            let teardown = |id| Ok(Request::Teardown { id, name: NAME, version: 1 });
            handler.send(teardown).await?.into_done()?;
        }
        ensure!(self.stored().await.is_err(), "the table `{NAME}` still exists");
        Ok(())
    }

    /// Starts a process and greets it.
    async fn start(&self) -> anyhow::Result<Handler> {
        let current = CurrentProjector::default();
        current.set(NAME);
        let mut handler = Handler { process: Process::start(&self.spec, &current)?, last_id: 0 };
        handler.hello(NAME).await?.into_hello()?;
        Ok(handler)
    }

    fn line(
        &self,
        id: u64,
        stage: Stage,
        after: Position,
        through: Position,
        events: &[Event],
    ) -> anyhow::Result<Vec<u8>> {
        let projector = self.projector();
        let fence = fence_sql(&self.database.quoted_name(), projector, stage, after, through);
        let events: Vec<&Event> = events.iter().collect();
        let batch = ExternalBatch { after, through, fence: Some(&fence), events: &events };
        let id_of = ProjectorId { name: NAME.into(), version: 1 };
        Request::batch(id, &id_of, batch)?.to_line()
    }

    async fn send(
        &self,
        handler: &mut Handler,
        stage: Stage,
        after: Position,
        through: Position,
        events: &[Event],
    ) -> anyhow::Result<Response> {
        let id = handler.next_id();
        let line = self.line(id, stage, after, through, events)?;
        handler.exchange(id, &line).await
    }

    async fn expect_done(
        &mut self,
        answer: Response,
        through: Position,
        events: &[Event],
    ) -> anyhow::Result<()> {
        ensure!(matches!(answer, Response::Done { .. }), "it answered {answer:?}, not `done`");
        self.applied.extend(positions(events));
        self.check(through).await
    }

    async fn expect_not_mine(&self, answer: Response, at: Position) -> anyhow::Result<()> {
        ensure!(
            matches!(answer, Response::NotMine { .. }),
            "it answered {answer:?}, not `not_mine`"
        );
        self.check(at).await
    }

    /// Checks the projector's position, and that each event up to it is stored once, in order.
    async fn check(&self, expected: Position) -> anyhow::Result<()> {
        let position = self.position().await?;
        ensure!(position == expected, "the position is {position}, and must be {expected}");
        let stored = self.stored().await.context("the table cannot be read")?;
        let count = |position: &u64| stored.iter().filter(|stored| *stored == position).count();
        if let Some(missing) = self.applied.iter().find(|position| count(position) == 0) {
            bail!("event {missing} is not stored");
        }
        if let Some(twice) = stored.iter().find(|position| count(position) > 1) {
            bail!("event {twice} is stored more than once");
        }
        if let Some(extra) = stored.iter().find(|position| !self.applied.contains(position)) {
            bail!("event {extra} is stored, and its batch was not applied");
        }
        ensure!(stored == self.applied, "the events are not stored in their order");
        Ok(())
    }

    async fn position(&self) -> anyhow::Result<Position> {
        let id = &self.projector().id;
        let entry = Ledger::new(&self.database).entry(id).await?;
        Ok(entry.context("the handler deleted its projector's row")?.position)
    }

    /// The stored positions, in the order of storing.
    async fn stored(&self) -> Result<Vec<u64>, sqlx::Error> {
        let sql = "select cast(position as unsigned) from conformance order by seq";
        self.database
            .run_pooled(async |connection| sqlx::query_scalar(sql).fetch_all(connection).await)
            .await
    }

    /// Ends all sessions of the scratch database: the handler's, and our own idle ones.
    async fn kill_sessions(&self) -> anyhow::Result<()> {
        self.database.release_idle_sessions();
        let list = "select cast(id as unsigned) from information_schema.processlist \
                    where db = database() and id <> connection_id()";
        let kill = async |connection: &mut MySqlConnection| {
            let ids: Vec<u64> = sqlx::query_scalar(list).fetch_all(&mut *connection).await?;
            for id in ids {
                // The session may have ended already.
                let kill = sqlx::raw_sql(AssertSqlSafe(format!("kill {id}")));
                let _ = kill.execute(&mut *connection).await;
            }
            Ok(())
        };
        Ok(self.database.run_pooled(kill).await?)
    }
}

impl Handler {
    fn next_id(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    async fn hello(&mut self, name: &str) -> anyhow::Result<Response> {
        let events = ["*".to_owned()];
        self.send(|id| {
            Ok(Request::Hello {
                protocol: PROTOCOL,
                id,
                name,
                version: 1,
                digest: "",
                delivery: "exactly_once",
                events: &events,
            })
        })
        .await
    }

    async fn send<'a>(
        &mut self,
        message: impl FnOnce(u64) -> anyhow::Result<Request<'a>>,
    ) -> anyhow::Result<Response> {
        let id = self.next_id();
        let line = message(id)?.to_line()?;
        self.exchange(id, &line).await
    }

    async fn exchange(&mut self, id: u64, line: &[u8]) -> anyhow::Result<Response> {
        let seconds = TIME_LIMIT.as_secs();
        timeout(TIME_LIMIT, self.process.exchange(id, line))
            .await
            .with_context(|| format!("it did not answer within {seconds} s"))?
    }
}

async fn refuse_unknown_projector(handler: &mut Handler) -> anyhow::Result<()> {
    match handler.hello("no_such_projector").await? {
        Response::Failed { .. } => Ok(()),
        other => bail!("it answered {other:?} to hello for a projector that it does not have"),
    }
}

fn last(events: &[Event]) -> Position {
    events.last().map_or(Position::START, Event::position)
}

fn positions(events: &[Event]) -> impl Iterator<Item = u64> {
    events.iter().map(|event| event.position().get())
}
