//! Finds the inserts that are sent row by row although their text would allow many rows.

use sqlx::MySqlConnection;

use super::handler::Handlers;
use super::tables::check_tables;

/// Why no insert of a file is sent together with others.
pub(super) const FILE_REASON: &str = "the file uses a user variable, `row_count()`, \
                                      `last_insert_id()`, `call` or the like";

/// An insert that is sent row by row.
#[derive(Debug)]
pub(super) struct RowByRow {
    /// `FILE:LINE`.
    pub(super) origin: String,
    pub(super) table: String,
    pub(super) reason: String,
    /// Whether the file demands with `batch = true` that it is not.
    pub(super) is_refused: bool,
}

impl RowByRow {
    /// `FILE:LINE: table NAME: reason`.
    pub(super) fn description(&self) -> String {
        format!("{}: table {}: {}", self.origin, self.table, self.reason)
    }
}

/// Checks the tables of all inserts that could be sent together.
///
/// # Errors
/// Transient errors.
pub(super) async fn find(
    handlers: &Handlers,
    db: &mut MySqlConnection,
) -> Result<Vec<RowByRow>, sqlx::Error> {
    let inserts: Vec<_> = handlers
        .iter()
        .filter_map(|handler| Some((handler, handler.coalescable_insert()?)))
        .collect();
    if inserts.is_empty() {
        return Ok(Vec::new());
    }
    let checked = match handlers.tables() {
        Some(tables) => Some(check_tables(&tables.targets(), db).await?),
        None => None,
    };
    let mut found = Vec::new();
    for (handler, (insert, table)) in inserts {
        let reason = match &checked {
            None => FILE_REASON.to_owned(),
            Some(checked) => match checked.get(table.get()) {
                Some(Err(refusal)) => {
                    // Setup logs it, so the first transaction does not have to.
                    if let Some(tables) = handlers.tables() {
                        tables.record_logged(table.get(), *refusal);
                    }
                    refusal.to_string()
                }
                _ => continue,
            },
        };
        found.push(RowByRow {
            origin: handler.origin.to_string(),
            table: insert.table.clone(),
            reason,
            is_refused: handler.must_batch,
        });
    }
    Ok(found)
}
