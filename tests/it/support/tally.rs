//! A projector that records every event that it handles, so that a test sees every loss and
//! repetition.

use std::sync::Arc;

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use projectionist::{Event, EventTypes, Mode, Projector, Registry, async_trait};

use super::World;

/// Called for each event after it is recorded. Tests inject faults here.
pub type Hook = Arc<dyn Fn(&Event) -> anyhow::Result<()> + Send + Sync>;

/// Writes each event's position into the table of the projector's name. The table has no unique key
/// on the position, so a repetition is stored.
#[derive(Clone)]
pub struct Tally {
    name: String,
    mode: Mode,
    types: Vec<&'static str>,
    side_effects: bool,
    hook: Option<Hook>,
}

impl Tally {
    pub fn new(name: &str) -> Self {
        Tally {
            name: name.into(),
            mode: Mode::FromBeginning,
            types: Vec::new(),
            side_effects: false,
            hook: None,
        }
    }

    pub fn mode(self, mode: Mode) -> Self {
        Tally { mode, ..self }
    }

    /// Subscribes only to events of these types.
    pub fn only(self, types: &[&'static str]) -> Self {
        Tally { types: types.to_vec(), ..self }
    }

    pub fn with_side_effects(self) -> Self {
        Tally { side_effects: true, ..self }
    }

    /// Calls `hook` for each event.
    pub fn hook(self, hook: impl Fn(&Event) -> anyhow::Result<()> + Send + Sync + 'static) -> Self {
        Tally { hook: Some(Arc::new(hook)), ..self }
    }

    /// Fails at this position.
    pub fn failing_at(self, position: u64) -> Self {
        self.hook(move |event| {
            anyhow::ensure!(event.position().get() != position, "event {position} is poison");
            Ok(())
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The text of a projector file that records the same events. Then the statements in `then` run
    /// for each event; they may use `:position`.
    pub fn file(&self, then: &[&str]) -> String {
        let name = &self.name;
        let then: String =
            then.iter().map(|sql| format!("\n[[on]]\nevents = ['*']\nsql = '{sql}'\n")).collect();
        format!(
            "name = '{name}'\nversion = 1\nmode = 'from_beginning'\n\
             setup = ['create table if not exists {name} (seq bigint auto_increment primary key, \
             position bigint unsigned not null)']\n\
             [[on]]\nevents = ['*']\nsql = 'insert into {name} (position) \
             values (:position)'\n{then}"
        )
    }

    /// The recorded positions, in the order of recording.
    pub async fn applied(&self, world: &World) -> Vec<u64> {
        let sql = format!("select position from {} order by seq", self.name);
        sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_all(&mut world.connection().await)
            .await
            .expect("the projector's table exists")
    }

    /// The positions that a projector at `position` should have recorded, read from the log.
    pub async fn expected(&self, world: &World, position: u64) -> Vec<u64> {
        let log: Vec<(u64, String)> = sqlx::query_as(
            "select position, event_type from events where position <= ? \
             and event_type not like '$%' order by position",
        )
        .bind(position)
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the log is readable");
        let wanted = |event_type: &str| self.types.is_empty() || self.types.contains(&event_type);
        log.into_iter()
            .filter(|(_, event_type)| wanted(event_type))
            .map(|(position, _)| position)
            .collect()
    }
}

/// A registry of these projectors, in this order.
pub fn registry(tallies: &[&Tally]) -> Registry {
    let mut registry = Registry::new();
    for tally in tallies {
        registry.add((*tally).clone()).expect("the name is unique");
    }
    registry
}

#[async_trait]
impl Projector for Tally {
    fn name(&self) -> &str {
        &self.name
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn event_types(&self) -> EventTypes {
        if self.types.is_empty() {
            EventTypes::All
        } else {
            EventTypes::only(self.types.iter().copied())
        }
    }

    fn has_side_effects(&self) -> bool {
        self.side_effects
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let sql = format!(
            "create table if not exists {} (seq bigint auto_increment primary key, \
             position bigint unsigned not null)",
            self.name
        );
        sqlx::query(AssertSqlSafe(sql)).execute(db).await?;
        Ok(())
    }

    async fn teardown(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        sqlx::query(AssertSqlSafe(format!("drop table if exists {}", self.name)))
            .execute(db)
            .await?;
        Ok(())
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let sql = format!("insert into {} (position) values (?)", self.name);
        // The row is written before the hook runs, so that a fault in the hook leaves a write to
        // roll back.
        sqlx::query(AssertSqlSafe(sql)).bind(event.position().get()).execute(db).await?;
        self.hook.as_ref().map_or(Ok(()), |hook| hook(event))
    }
}
