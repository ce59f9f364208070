//! A projector whose events a process applies.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use sqlx::{Connection as _, MySqlConnection};

use super::host::{Greeting, Host};
use super::process::CommandSpec;
use super::protocol::{Request, Response};
use crate::model::event::{Event, Position};
use crate::model::external::{Answer, Delivery, ExternalBatch, ExternalHandler, NoAnswer};
use crate::model::projector::{EventTypes, Mode, Projector, ProjectorId, SessionUse};
use crate::model::registry;

/// The longest time limit. The engine has a shorter one for a batch; setup and teardown have none
/// of their own.
const MAX_TIME: Duration = Duration::from_secs(3600);

/// How often the database session of a setup is used while the handler works. The server ends a
/// session that is idle for a minute.
const KEEP_ALIVE: Duration = Duration::from_secs(20);

/// A projector whose events a process applies.
pub(crate) struct CommandProjector {
    /// Name, version, mode and the SQL of setup and teardown.
    definition: Box<dyn Projector>,
    event_types: EventTypes,
    /// The tables that only this projector writes.
    tables: Vec<String>,
    client: Arc<Client>,
}

/// A projector's side of a process.
struct Client {
    host: Arc<Host>,
    greeting: Greeting,
    delivery: Delivery,
}

/// The processes of all projectors.
#[derive(Debug, Default, Clone)]
pub(crate) struct Processes(Vec<Arc<Host>>);

impl Processes {
    /// The process for a command. Projectors with the same command share one, if their delivery is
    /// exactly once: with another delivery, a projector's row is locked while the process works, so
    /// it must not wait for others.
    fn host(&mut self, spec: CommandSpec, delivery: Delivery) -> Arc<Host> {
        if delivery != Delivery::ExactlyOnce {
            return Arc::new(Host::new(spec));
        }
        if let Some(host) = self.0.iter().find(|host| host.spec == spec) {
            return Arc::clone(host);
        }
        let host = Arc::new(Host::new(spec));
        self.0.push(Arc::clone(&host));
        host
    }
}

impl CommandProjector {
    /// Gives the projector of `definition` a process for its events.
    pub(crate) fn new(
        definition: impl Projector,
        event_types: EventTypes,
        tables: Vec<String>,
        delivery: Delivery,
        spec: CommandSpec,
        processes: &mut Processes,
    ) -> Self {
        let greeting = Greeting {
            id: ProjectorId { name: definition.name().to_owned(), version: definition.version() },
            digest: registry::definition_digest(&definition, &event_types),
            delivery: delivery.as_str(),
            events: registry::sorted_types(&event_types),
        };
        let host = processes.host(spec, delivery);
        let tables = definition.tables().into_iter().chain(tables).collect();
        let client = Arc::new(Client { host, greeting, delivery });
        CommandProjector { definition: Box::new(definition), event_types, tables, client }
    }

    /// The projector's process, for the engine.
    pub(crate) fn external(&self) -> Arc<dyn ExternalHandler> {
        Arc::clone(&self.client) as Arc<dyn ExternalHandler>
    }

    /// Sends a setup or a teardown, and keeps the database session alive meanwhile.
    async fn send_step<'a>(
        &'a self,
        db: &mut MySqlConnection,
        message: impl FnOnce(u64, &'a str, u32) -> Request<'a>,
    ) -> anyhow::Result<()> {
        let id = &self.client.greeting.id;
        let message = |number| Ok(message(number, &id.name, id.version));
        let sent = self.client.host.send(&self.client.greeting, MAX_TIME, message);
        tokio::pin!(sent);
        loop {
            tokio::select! {
                response = &mut sent => {
                    return response.map_err(NoAnswer::into_error)?.into_done();
                }
                () = tokio::time::sleep(KEEP_ALIVE) => db.ping().await?,
            }
        }
    }
}

#[async_trait]
impl Projector for CommandProjector {
    fn name(&self) -> &str {
        self.definition.name()
    }

    fn version(&self) -> u32 {
        self.definition.version()
    }

    fn mode(&self) -> Mode {
        self.definition.mode()
    }

    fn event_types(&self) -> EventTypes {
        self.event_types.clone()
    }

    fn has_side_effects(&self) -> bool {
        self.definition.has_side_effects()
    }

    fn revision(&self) -> String {
        self.definition.revision()
    }

    fn tables(&self) -> Vec<String> {
        self.tables.clone()
    }

    fn session(&self) -> SessionUse {
        SessionUse::Shared
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.definition.setup(db).await?;
        self.send_step(db, |id, name, version| Request::Setup { id, name, version })
            .await
            .context("the handler's setup")
    }

    async fn teardown(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.send_step(db, |id, name, version| Request::Teardown { id, name, version })
            .await
            .context("the handler's teardown")?;
        self.definition.teardown(db).await
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.handle_batch(&[event], db).await
    }

    /// Applies a batch at least once, while the caller holds the claim on the projector's row.
    async fn handle_batch(
        &self,
        events: &[&Event],
        _db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        let position = |event: Option<&&Event>| event.map_or(Position::START, |e| e.position());
        let batch = ExternalBatch {
            after: position(events.first()).previous(),
            through: position(events.last()),
            fence: None,
            events,
        };
        match self.client.apply(batch, MAX_TIME).await.map_err(NoAnswer::into_error)? {
            Answer::Done => Ok(()),
            Answer::NotMine => bail!("the handler answered `not_mine` to a batch without a fence"),
            Answer::Failed(failure) => Err(failure.into_error()),
        }
    }
}

#[async_trait]
impl ExternalHandler for Client {
    fn delivery(&self) -> Delivery {
        self.delivery
    }

    async fn apply(
        &self,
        batch: ExternalBatch<'_>,
        time_limit: Duration,
    ) -> Result<Answer, NoAnswer> {
        let message = |id| Request::batch(id, &self.greeting.id, batch);
        let response = self.host.send(&self.greeting, time_limit, message).await?;
        Response::into_answer(response).map_err(NoAnswer::Ended)
    }

    async fn stop(&self) {
        self.host.stop().await;
    }
}
