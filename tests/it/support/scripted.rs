//! A projector that follows a script: its fault may wait, run statements, commit, panic or never end.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use projectionist::sqlx::MySqlConnection;
use projectionist::{Event, EventTypes, Mode, Projector, async_trait};

use super::Tally;

type Script =
    Arc<dyn for<'a> Fn(&'a Event, &'a mut MySqlConnection) -> BoxFuture<'a, anyhow::Result<()>> + Send + Sync>;

/// A tally that runs a script after it has written an event down, on the connection of the same transaction.
#[derive(Clone)]
pub struct Scripted {
    tally: Tally,
    script: Script,
}

impl Scripted {
    pub fn new<F>(tally: &Tally, script: F) -> Self
    where
        F: for<'a> Fn(&'a Event, &'a mut MySqlConnection) -> BoxFuture<'a, anyhow::Result<()>> + Send + Sync + 'static,
    {
        Scripted { tally: tally.clone(), script: Arc::new(script) }
    }
}

#[async_trait]
impl Projector for Scripted {
    fn name(&self) -> &str {
        self.tally.name()
    }

    fn mode(&self) -> Mode {
        Projector::mode(&self.tally)
    }

    fn event_types(&self) -> EventTypes {
        self.tally.event_types()
    }

    fn has_side_effects(&self) -> bool {
        self.tally.has_side_effects()
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.tally.setup(db).await
    }

    async fn teardown(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.tally.teardown(db).await
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.tally.handle(event, db).await?;
        (self.script)(event, db).await
    }
}
