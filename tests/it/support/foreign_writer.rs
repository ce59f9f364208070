//! A writer that knows only the `events` table, and queries on the resulting log.

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};

use super::World;

/// Inserts one event in the connection's current transaction, as a foreign writer does.
pub async fn write(
    writer: &mut MySqlConnection,
    stream: &str,
    version: u64,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into events (stream_id, stream_version, event_type, payload) \
         values (?, ?, 'Opened', '{}')",
    )
    .bind(stream)
    .bind(version)
    .execute(writer)
    .await
    .map(|_| ())
}

/// The server's error number and message.
pub fn server_error(error: &sqlx::Error) -> (u16, String) {
    let error = error.as_database_error().expect("the error comes from the server");
    let number = error.downcast_ref::<sqlx::mysql::MySqlDatabaseError>().number();
    (number, error.message().to_owned())
}

impl World {
    /// The positions of the rows that meet a condition, fillers included.
    pub async fn positions(&self, condition: &str) -> Vec<u64> {
        let sql = format!("select position from events where {condition} order by position");
        sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_all(&mut self.connection().await)
            .await
            .expect("the log is readable")
    }

    pub async fn fillers(&self) -> Vec<u64> {
        self.positions("event_type = '$filler'").await
    }
}
