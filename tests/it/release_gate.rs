//! The release gate: boot exits with 0 only if every projector is live or finished at the end of
//! the log that was visible when boot began, its read model contains its whole past, and its
//! definition is the one that workers play.

mod broken;
mod definitions;
mod tables;
mod target;

use std::time::Duration;

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use projectionist::{
    BootReport, BootSettings, Event, EventTypes, Limits, Projector, ProjectorId, Registry,
    async_trait, boot,
};

use crate::support::{Gate, World};

/// A projector file that counts events in a table of its name.
fn counter(name: &str, events: &str) -> String {
    format!(
        "name = '{name}'\nversion = 1\nmode = 'from_beginning'\n\
         setup = ['create table if not exists {name} (id int primary key, n bigint not null)']\n\
         teardown = ['drop table if exists {name}']\n\n\
         [[on]]\nevents = {events}\n\
         sql = 'insert into {name} values (1, 1) on duplicate key update n = n + 1'\n"
    )
}

/// The number of events that the projector of a [`counter`] file has counted.
async fn count_rows(world: &World, name: &str) -> u64 {
    world.number(&format!("select cast(ifnull(sum(n), 0) as unsigned) from {name}")).await
}

/// A projector in Rust that owns a table, and stores each position with its own revision there.
#[derive(Clone)]
struct Owner {
    name: &'static str,
    revision: &'static str,
    types: Vec<&'static str>,
    /// Whether it returns its table from `tables`.
    names_its_table: bool,
    /// The gate at which its setup waits, after it has created the table.
    after_setup: Option<Gate>,
    fails_at: Option<u64>,
}

impl Owner {
    fn new(name: &'static str) -> Self {
        Owner {
            name,
            revision: "1",
            types: Vec::new(),
            names_its_table: true,
            after_setup: None,
            fails_at: None,
        }
    }

    fn registry(self) -> Registry {
        Registry::new().with(self).expect("the name is valid")
    }
}

#[async_trait]
impl Projector for Owner {
    fn name(&self) -> &str {
        self.name
    }

    fn event_types(&self) -> EventTypes {
        if self.types.is_empty() {
            EventTypes::All
        } else {
            EventTypes::only(self.types.iter().copied())
        }
    }

    fn revision(&self) -> String {
        self.revision.into()
    }

    fn tables(&self) -> Vec<String> {
        if self.names_its_table { vec![self.name.into()] } else { Vec::new() }
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let create = format!(
            "create table if not exists {} (seq bigint auto_increment primary key, \
             position bigint unsigned not null, revision varchar(20) not null)",
            self.name
        );
        sqlx::query(AssertSqlSafe(create)).execute(db).await?;
        if let Some(gate) = &self.after_setup {
            gate.pass().await;
        }
        Ok(())
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let position = event.position().get();
        anyhow::ensure!(
            self.fails_at != Some(position),
            "event {position} fails in revision {}",
            self.revision
        );
        let insert = format!("insert into {} (position, revision) values (?, ?)", self.name);
        sqlx::query(AssertSqlSafe(insert)).bind(position).bind(self.revision).execute(db).await?;
        Ok(())
    }
}

/// What an [`Owner`] has stored: positions, each with the revision that applied it.
async fn applied(world: &World, name: &str) -> Vec<(u64, String)> {
    let sql = format!("select position, revision from {name} order by seq");
    sqlx::query_as(AssertSqlSafe(sql))
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the rows of its table")
}

/// Boots as the command does, with `--accept` for the named projectors.
async fn boot_accepting(world: &World, registry: &Registry, accept: &[&str]) -> BootReport {
    let limits =
        Limits::default().with_batch(100).with_retry_timeout(Some(Duration::from_secs(20)));
    let mut settings = BootSettings::from(limits);
    settings.accept =
        accept.iter().map(|&name| ProjectorId { name: name.into(), version: 1 }).collect();
    boot(&world.database, registry, settings, |_| {}).await.expect("boot ends")
}

/// Asserts that boot was refused, and that its explanation contains `words`.
#[track_caller]
fn assert_refused(report: &BootReport, words: &[&str]) {
    assert!(!report.is_released(), "{report:?}");
    let why = report.explain();
    for word in words {
        assert!(why.contains(word), "{word:?} is not in: {why}");
    }
}
