//! A projector that a file declares.

use std::sync::Arc;

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use sqlx::{AssertSqlSafe, MySqlConnection};
use tracing::info;

use super::handler::Handlers;
use super::{coalesce, row_by_row};
use crate::model::event::Event;
use crate::model::projector::{EventTypes, Mode, Projector, ProjectorId, SessionUse};

/// The most statements of one transaction. They take a few seconds, much less than the handler's
/// timeout.
const MAX_STATEMENTS_PER_TRANSACTION: usize = 60_000;

/// A projector that a file declares.
#[derive(Debug)]
pub(super) struct DeclaredProjector {
    pub(super) id: ProjectorId,
    pub(super) mode: Mode,
    pub(super) side_effects: bool,
    pub(super) setup: Vec<SetupStatement>,
    pub(super) teardown: Vec<SetupStatement>,
    pub(super) handlers: Handlers,
    /// The SHA-256 of the file's content.
    pub(super) revision: String,
    /// The tables that `setup` creates.
    pub(super) tables: Vec<String>,
}

#[async_trait]
impl Projector for DeclaredProjector {
    fn name(&self) -> &str {
        &self.id.name
    }

    fn version(&self) -> u32 {
        self.id.version
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn event_types(&self) -> EventTypes {
        self.handlers.event_types()
    }

    fn has_side_effects(&self) -> bool {
        self.side_effects
    }

    fn revision(&self) -> String {
        self.revision.clone()
    }

    fn tables(&self) -> Vec<String> {
        self.tables.clone()
    }

    fn session(&self) -> SessionUse {
        if self.handlers.is_opaque() { SessionUse::PerEvent } else { SessionUse::Shared }
    }

    fn max_batch(&self) -> usize {
        MAX_STATEMENTS_PER_TRANSACTION / self.handlers.max_statements_per_event().max(1)
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        run_statements(&self.setup, db).await?;
        for insert in row_by_row::find(&self.handlers, db).await? {
            if insert.is_refused {
                bail!("{}. The file has `batch = true` for it", insert.description());
            }
            info!(
                projector = %self.id, table = insert.table, reason = insert.reason,
                "rows are written one by one: {}", insert.origin
            );
        }
        Ok(())
    }

    async fn teardown(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        run_statements(&self.teardown, db).await
    }

    async fn row_by_row(&self, db: &mut MySqlConnection) -> anyhow::Result<Vec<String>> {
        let found = row_by_row::find(&self.handlers, db).await?;
        Ok(found.into_iter().map(|insert| insert.description()).collect())
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.handle_batch(&[event], db).await
    }

    async fn handle_batch(
        &self,
        events: &[&Event],
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        coalesce::apply(&self.id, &self.handlers, events, db).await
    }
}

/// A statement of setup or teardown.
#[derive(Debug)]
pub(super) struct SetupStatement {
    pub(super) sql: Arc<str>,
    /// `FILE:LINE`, for errors.
    pub(super) origin: String,
}

/// Sends each statement as text, because some DDL cannot be prepared.
async fn run_statements(
    statements: &[SetupStatement],
    db: &mut MySqlConnection,
) -> anyhow::Result<()> {
    for statement in statements {
        let query = sqlx::raw_sql(AssertSqlSafe(Arc::clone(&statement.sql)));
        query.execute(&mut *db).await.with_context(|| statement.origin.clone())?;
    }
    Ok(())
}
