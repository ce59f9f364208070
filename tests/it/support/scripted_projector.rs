//! A projector that runs a script of the test: it can wait, run statements, commit, panic or never
//! return.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use projectionist::sqlx::{self, MySqlConnection};
use projectionist::{Event, EventTypes, Mode, Projector, Registry, async_trait};

use super::{Gate, Tally};

type Script = Arc<
    dyn for<'a> Fn(&'a Event, &'a mut MySqlConnection) -> BoxFuture<'a, anyhow::Result<()>>
        + Send
        + Sync,
>;

/// A tally that runs a script after it has recorded an event, on the connection of the same
/// transaction.
#[derive(Clone)]
pub struct ScriptedProjector {
    tally: Tally,
    script: Script,
}

impl ScriptedProjector {
    pub fn new<F>(tally: &Tally, script: F) -> Self
    where
        F: for<'a> Fn(&'a Event, &'a mut MySqlConnection) -> BoxFuture<'a, anyhow::Result<()>>
            + Send
            + Sync
            + 'static,
    {
        ScriptedProjector { tally: tally.clone(), script: Arc::new(script) }
    }
}

#[async_trait]
impl Projector for ScriptedProjector {
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

/// Runs a script at one position only.
pub fn scripted_at<F>(tally: &Tally, position: u64, script: F) -> ScriptedProjector
where
    F: for<'a> Fn(&'a mut MySqlConnection) -> BoxFuture<'a, anyhow::Result<()>>
        + Send
        + Sync
        + 'static,
{
    ScriptedProjector::new(tally, move |event: &Event, db| {
        if event.position().get() == position { script(db) } else { Box::pin(async { Ok(()) }) }
    })
}

/// Waits at a gate at one position.
pub fn gated(tally: &Tally, position: u64, gate: &Gate) -> ScriptedProjector {
    let gate = gate.clone();
    scripted_at(tally, position, move |_| {
        let gate = gate.clone();
        Box::pin(async move {
            gate.pass().await;
            Ok(())
        })
    })
}

/// A registry of these projectors, in this order.
pub fn registry_of(projectors: impl IntoIterator<Item = impl Projector>) -> Registry {
    let mut registry = Registry::new();
    for projector in projectors {
        registry.add(projector).expect("the name is unique");
    }
    registry
}

/// Runs a statement, as a handler would.
pub async fn run(db: &mut MySqlConnection, sql: &'static str) -> anyhow::Result<()> {
    sqlx::raw_sql(sql).execute(db).await?;
    Ok(())
}
