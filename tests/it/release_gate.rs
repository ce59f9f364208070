//! The deploy gate tells the truth: boot exits 0 only when every projector is live or finished at
//! the end of the log that was visible when boot began, on a read model that holds its whole past,
//! with the definition that is played.

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
         [[on]]\nevents = {events}\nsql = 'insert into {name} values (1, 1) on duplicate key update n = n + 1'\n"
    )
}

/// What such a projector has counted.
async fn count_rows(world: &World, name: &str) -> u64 {
    world.number(&format!("select cast(ifnull(sum(n), 0) as unsigned) from {name}")).await
}

/// A projector in Rust that names its table, and writes down each event with its own revision.
#[derive(Clone)]
struct Owner {
    name: &'static str,
    revision: &'static str,
    types: Vec<&'static str>,
    /// Whether it says which table is its own.
    names_its_table: bool,
    /// Where its setup stands once it has created the table.
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
        Registry::new().with(self).expect("a name")
    }
}

#[async_trait]
impl Projector for Owner {
    fn name(&self) -> &str {
        self.name
    }

    fn event_types(&self) -> EventTypes {
        match self.types.is_empty() {
            true => EventTypes::All,
            false => EventTypes::only(self.types.iter().copied()),
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
            "create table if not exists {} (seq bigint auto_increment primary key, position bigint unsigned not null, \
             revision varchar(20) not null)",
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
            "event {position} is poison to revision {}",
            self.revision
        );
        let insert = format!("insert into {} (position, revision) values (?, ?)", self.name);
        sqlx::query(AssertSqlSafe(insert)).bind(position).bind(self.revision).execute(db).await?;
        Ok(())
    }
}

/// What such a projector has written down: positions with the revision that applied them.
async fn applied(world: &World, name: &str) -> Vec<(u64, String)> {
    let sql = format!("select position, revision from {name} order by seq");
    sqlx::query_as(AssertSqlSafe(sql))
        .fetch_all(&mut world.connection().await)
        .await
        .expect("its table")
}

/// Boots as the command does, with what an operator accepts.
async fn boot_accepting(world: &World, registry: &Registry, accept: &[&str]) -> BootReport {
    let limits =
        Limits { batch: 100, retry_timeout: Some(Duration::from_secs(20)), ..Limits::default() };
    let mut settings = BootSettings::from(limits);
    settings.accept =
        accept.iter().map(|&name| ProjectorId { name: name.into(), version: 1 }).collect();
    boot(&world.database, registry, settings, |_| {}).await.expect("boot comes to an end")
}

/// Asserts that a boot failed because of one projector, and says why.
#[track_caller]
fn assert_refused(report: &BootReport, words: &[&str]) {
    assert!(!report.is_released(), "{report:?}");
    let why = report.explain();
    for word in words {
        assert!(why.contains(word), "{word:?} is not in: {why}");
    }
}
