//! Statements that are sent together, in one round trip.
//!
//! The server executes the statements of a packet one after the other, with the same effect as if
//! each had been sent by itself, and stops at the first error.
//!
//! Nothing is prepared. sqlx leaves Nagle's algorithm on, and closes a prepared statement with a
//! packet that the server does not answer. The packet after that waits for the server's delayed
//! acknowledgement, up to 40 ms.

use std::sync::Arc;

use anyhow::Context as _;
use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, MySqlConnection};

use crate::database::error::server_error_number;
use crate::database::multi_row::MAX_BYTES;
use crate::model::running_statement;

/// The most statements in a packet. A cancelled packet then ends soon.
const MAX_STATEMENTS: usize = 512;

/// Separates statements. The line break ends a comment that the statement before it may have.
const SEPARATOR: &str = "\n;\n";

/// The server's number for a date, or another value, that the column does not accept.
const INCORRECT_VALUE: u16 = 1292;

/// Statements that wait to be sent.
#[derive(Debug, Default)]
pub(super) struct Packet<'h> {
    text: String,
    /// The `FILE:LINE` of each statement.
    origins: Vec<&'h str>,
}

impl<'h> Packet<'h> {
    /// Adds a statement that `write` appends to the text. Sends the packet first if it is full.
    ///
    /// # Errors
    /// That of `write`, or of a waiting statement.
    pub(super) async fn add(
        &mut self,
        origin: &'h str,
        statement: &str,
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        let is_full =
            self.text.len() + statement.len() > MAX_BYTES || self.origins.len() >= MAX_STATEMENTS;
        if is_full {
            self.send(db).await?;
        }
        if !self.origins.is_empty() {
            self.text.push_str(SEPARATOR);
        }
        self.text.push_str(statement);
        self.origins.push(origin);
        Ok(())
    }

    /// Sends the waiting statements.
    ///
    /// # Errors
    /// The error of the first statement that fails, with its `FILE:LINE`.
    pub(super) async fn send(&mut self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        if self.origins.is_empty() {
            return Ok(());
        }
        let origins = std::mem::take(&mut self.origins);
        let text: Arc<str> = std::mem::take(&mut self.text).into();
        let mut done = 0;
        let sent = async {
            running_statement::begin(origins.first().copied().unwrap_or_default());
            let mut results = sqlx::raw_sql(AssertSqlSafe(text)).execute_many(db);
            while results.try_next().await?.is_some() {
                done += 1;
                if let Some(origin) = origins.get(done) {
                    running_statement::begin(origin);
                }
            }
            Ok::<(), sqlx::Error>(())
        };
        let error = match sent.await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        let origin = origins.get(done).or(origins.last()).copied().unwrap_or_default();
        let advice = match server_error_number(&error) {
            Some(INCORRECT_VALUE) if error.to_string().contains("date") => {
                ": for a date with an offset, such as `Z` at its end, write \
                 `:payload.at|datetime` instead of `:payload.at`"
            }
            _ => "",
        };
        Err(error).with_context(|| format!("{origin}{advice}"))
    }
}
