//! A server that hangs up on one handler and on nobody else: a lost connection that would be lost
//! for ever.
//!
//! It does so when a statement is larger than its `max_allowed_packet`. By a little: it says so
//! (error 1153). By much more than the network's buffers hold: it closes the connection while the
//! statement is still being sent, and then all that is seen is a connection reset or a broken pipe,
//! as of any network that fails.

use sqlx::MySqlConnection;

use crate::database::Database;
use crate::engine::apply::ApplyError;

/// How often in a row before it counts as the projector's own failure.
///
/// Between the first attempt and the last lie at least five seconds, for the pauses grow
/// (`backoff::delay`), and in each a witness was there: a connection of our own that was opened
/// after the attempt before, and that answers still after this one. So no restart, no failover and
/// no cut of the network explains any of them, and a session that somebody kills ends in another
/// way. What remains to chance is a fault that strikes this one connection, in the middle of its
/// handler, ten times in a row, and spares its neighbour each time.
const MAX_CONSECUTIVE_CLOSES: u32 = 10;

/// What is known of the attempts at one batch.
#[derive(Default)]
pub(crate) struct PacketTooLargeDetector {
    consecutive_closes: u32,
    control_connection: Option<MySqlConnection>,
}

impl PacketTooLargeDetector {
    /// Takes note of how an attempt ended, and says whether it was the handler's doing.
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

    /// The error of the last attempt, with what is known of all.
    pub(crate) fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        error.context(format!(
            "the server hung up on the handler {} times in a row while it kept another connection: most likely a statement \
             is larger than its max_allowed_packet; write less in one statement, or raise that",
            self.consecutive_closes
        ))
    }
}
