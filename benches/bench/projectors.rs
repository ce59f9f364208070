//! The measured projectors, and the upsert that the writing ones share.

use std::sync::Arc;

use anyhow::Context;
use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use projectionist::{Event, EventTypes, Projector, Registry, async_trait, load};
use time::OffsetDateTime;

use crate::world::{World, execute};

const COLUMNS: &str = "(\
    stream_id varchar(200) character set utf8mb4 collate utf8mb4_bin primary key, \
    last_event varchar(200) character set utf8mb4 collate utf8mb4_bin not null, \
    at datetime(6) not null, events bigint not null)";

const ON_DUPLICATE: &str =
    "on duplicate key update last_event = values(last_event), at = values(at), events = events + 1";

/// The number of rows in one statement of the batched upsert.
pub const ROWS: usize = 1_000;

/// A read model with one row for each stream.
#[derive(Clone)]
pub struct ReadModel {
    pub table: String,
    upsert: Arc<str>,
    upsert_rows: Arc<str>,
}

/// The values of an event that the read model uses.
pub struct WriteEvent<'e> {
    pub stream_id: &'e str,
    pub event_type: &'e str,
    pub recorded_at: OffsetDateTime,
}

impl ReadModel {
    pub fn new(table: &str) -> Self {
        ReadModel {
            table: table.to_owned(),
            upsert: upsert(table, 1).into(),
            upsert_rows: upsert(table, ROWS).into(),
        }
    }

    /// Makes the table, empty.
    pub async fn make(&self, world: &World) -> anyhow::Result<()> {
        world.execute(&format!("drop table if exists {}", self.table)).await?;
        world.execute(&format!("create table {} {COLUMNS}", self.table)).await
    }

    /// Writes one event with one statement.
    pub async fn write(
        &self,
        event: WriteEvent<'_>,
        db: &mut MySqlConnection,
    ) -> Result<(), sqlx::Error> {
        let query = sqlx::query(AssertSqlSafe(Arc::clone(&self.upsert)));
        query
            .bind(event.stream_id)
            .bind(event.event_type)
            .bind(event.recorded_at)
            .execute(db)
            .await
            .map(|_| ())
    }

    /// Writes up to a thousand events with one statement.
    pub async fn write_rows<'e>(
        &self,
        events: impl ExactSizeIterator<Item = WriteEvent<'e>>,
        db: &mut MySqlConnection,
    ) -> Result<(), sqlx::Error> {
        let text = match events.len() {
            0 => return Ok(()),
            ROWS => Arc::clone(&self.upsert_rows),
            rows => upsert(&self.table, rows).into(),
        };
        let mut query = sqlx::query(AssertSqlSafe(text)).persistent(events.len() == ROWS);
        for event in events {
            query = query.bind(event.stream_id).bind(event.event_type).bind(event.recorded_at);
        }
        query.execute(db).await.map(|_| ())
    }

    /// The projector as a projector file. `events` is the event type, or `*`.
    pub fn declaration(&self, events: &str) -> String {
        let ReadModel { table, .. } = self;
        format!(
            "name = \"{table}\"\nversion = 1\nmode = \"from_beginning\"\n\
             setup = [\"create table if not exists {table} {COLUMNS}\"]\n\n\
             [[on]]\nevents = [\"{events}\"]\n\
             sql = \"insert into {table} values (:stream_id, :event_type, :recorded_at, 1) \
             {ON_DUPLICATE}\"\n"
        )
    }
}

fn upsert(table: &str, rows: usize) -> String {
    format!("insert into {table} values {} {ON_DUPLICATE}", vec!["(?, ?, ?, 1)"; rows].join(", "))
}

impl<'e> From<&'e Event> for WriteEvent<'e> {
    fn from(event: &'e Event) -> Self {
        WriteEvent {
            stream_id: event.stream_id(),
            event_type: event.event_type(),
            recorded_at: event.recorded_at(),
        }
    }
}

/// Does nothing with the events that it subscribes to.
pub struct Nothing {
    pub name: String,
    pub wanted: EventTypes,
}

impl Nothing {
    pub fn with_all() -> Self {
        Nothing { name: "nothing".into(), wanted: EventTypes::All }
    }
}

#[async_trait]
impl Projector for Nothing {
    fn name(&self) -> &str {
        &self.name
    }

    fn event_types(&self) -> EventTypes {
        self.wanted.clone()
    }

    async fn handle(&self, _: &Event, _: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(())
    }

    async fn handle_batch(&self, events: &[&Event], _: &mut MySqlConnection) -> anyhow::Result<()> {
        std::hint::black_box(events);
        Ok(())
    }
}

/// Writes each event with an upsert.
pub struct UpsertEach(pub ReadModel);

#[async_trait]
impl Projector for UpsertEach {
    fn name(&self) -> &str {
        &self.0.table
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(self.0.write(event.into(), db).await?)
    }
}

/// Writes a thousand events with one upsert.
pub struct UpsertRows(pub ReadModel);

#[async_trait]
impl Projector for UpsertRows {
    fn name(&self) -> &str {
        &self.0.table
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        Ok(self.0.write(event.into(), db).await?)
    }

    async fn handle_batch(
        &self,
        events: &[&Event],
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        for chunk in events.chunks(ROWS) {
            self.0.write_rows(chunk.iter().map(|event| WriteEvent::from(*event)), db).await?;
        }
        Ok(())
    }
}

/// Makes a temporary folder of projector files, as pairs of name and content.
pub fn folder(declarations: &[(&str, String)]) -> anyhow::Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    for (name, text) in declarations {
        std::fs::write(folder.path().join(format!("{name}.toml")), text)?;
    }
    Ok(folder)
}

/// The projectors of these read models, loaded from projector files.
pub fn declared(models: &[ReadModel], events: &str) -> anyhow::Result<Registry> {
    let files: Vec<_> =
        models.iter().map(|model| (model.table.as_str(), model.declaration(events))).collect();
    let mut registry = Registry::new();
    load(folder(&files)?.path(), &mut registry).context("loading the projector files")?;
    Ok(registry)
}

/// Empties the read models, so that each round starts the same.
pub async fn empty(world: &World, models: &[ReadModel]) -> anyhow::Result<()> {
    let mut connection = world.connection().await?;
    for model in models {
        execute(&mut connection, &format!("truncate table {}", model.table)).await?;
    }
    Ok(())
}
