//! Detects a handler that loses its connection at each attempt, and would be retried forever.
//!
//! The client sees only a lost connection, as after any network failure. There are two causes:
//!
//! - A statement is larger than `max_allowed_packet`. If it is slightly too large, the server
//!   reports error 1153. If it is larger than the network buffers, the server closes the connection
//!   while the statement is still being sent.
//! - The handler ends its own session. It kills it, or it sets `completion_type` to `RELEASE` and
//!   then ends the transaction.

use sqlx::MySqlConnection;

use crate::database::Database;
use crate::engine::apply::ApplyError;

/// How many consecutive closed connections count as the projector's own failure.
///
/// The backoff (`backoff::delay`) spreads the attempts over at least five seconds. In each attempt
/// a control connection, opened after the attempt before, still answers after this attempt. This
/// rules out a restart, a failover and a network failure. What remains is a fault that hits only
/// the handler's connection, ten times in a row.
const MAX_CONSECUTIVE_CLOSES: u32 = 10;

/// The recorded attempts at one batch.
#[derive(Default)]
pub(crate) struct ClosedConnectionDetector {
    consecutive_closes: u32,
    control_connection: Option<MySqlConnection>,
}

impl ClosedConnectionDetector {
    /// Records how an attempt ended. Returns `true` if the failure is attributed to the handler.
    pub(crate) async fn record(
        &mut self,
        database: &Database,
        applied: &Result<(), ApplyError>,
    ) -> bool {
        let control_connection = self.control_connection.take();
        if !matches!(applied, Err(ApplyError::ConnectionClosed(_))) {
            self.consecutive_closes = 0;
            return false;
        }
        let outlived = match control_connection {
            Some(control_connection) => database.ping_and_close(control_connection).await,
            None => false,
        };
        self.consecutive_closes = if outlived { self.consecutive_closes + 1 } else { 0 };
        if self.consecutive_closes == MAX_CONSECUTIVE_CLOSES {
            return true;
        }
        self.control_connection = database.open_dedicated().await.ok();
        false
    }

    /// Adds the diagnosis to the error of the last attempt.
    pub(crate) fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        error.context(format!(
            "the server closed the handler's connection {} times in a row, but kept another \
             connection open. Most likely a statement is larger than max_allowed_packet: write \
             less in one statement, or raise max_allowed_packet, and run boot --accept. Or the \
             handler ends its own session, by a kill or by completion_type = RELEASE. What it \
             committed before is unknown: rebuild the read model",
            self.consecutive_closes
        ))
    }
}
