//! The sessions of a server, and the statement that each runs.

use projectionist::sqlx::{self, MySqlConnection, Row, ValueRef};

use super::{World, eventually, server_connection};

/// A session of the server.
#[derive(Debug)]
pub struct Session {
    pub id: u64,
    pub user: String,
    pub database: String,
    pub state: String,
    /// The statement that the session runs now. Bytes that are not UTF-8 are replaced.
    pub statement: String,
}

/// Every session of the server. `information_schema.processlist` cannot be used: MySQL writes a
/// bound parameter unchanged into the statement, and that table fails with error 3854 if any
/// session binds bytes that are not UTF-8. The migrator binds such bytes, for its checksum.
pub async fn sessions(connection: &mut MySqlConnection) -> Vec<Session> {
    let rows = sqlx::raw_sql("show full processlist")
        .fetch_all(connection)
        .await
        .expect("the sessions are listed");
    rows.iter()
        .map(|row| {
            // The column's type differs between the servers, and its bytes are not always UTF-8.
            let text = |index: usize| {
                let value = row.try_get_raw(index).expect("the column exists");
                let bytes: &[u8] = if value.is_null() { b"" } else { row.get_unchecked(index) };
                String::from_utf8_lossy(bytes).into_owned()
            };
            Session {
                id: row.get_unchecked(0),
                user: text(1),
                database: text(3),
                state: text(6),
                statement: text(7),
            }
        })
        .collect()
}

/// Ends these sessions, except the ones that have already ended. Returns how many it ended.
pub async fn kill(
    connection: &mut MySqlConnection,
    sessions: impl IntoIterator<Item = Session>,
) -> usize {
    let mut killed = 0;
    for Session { id, .. } in sessions {
        let kill = sqlx::raw_sql(sqlx::AssertSqlSafe(format!("kill {id}")));
        killed += usize::from(kill.execute(&mut *connection).await.is_ok());
    }
    killed
}

impl World {
    /// The sessions in the world's database.
    pub async fn sessions(&self) -> Vec<Session> {
        let mut all = sessions(&mut server_connection().await).await;
        all.retain(|session| session.database == self.database_name);
        all
    }
}

#[tokio::test]
async fn sessions_are_listed_while_one_binds_invalid_utf_8() {
    let world = World::new().await;
    let mut other = world.connection().await;
    let binds = tokio::spawn(async move {
        sqlx::query("do sleep(?), ?")
            .bind(1_000)
            .bind(&[0x86_u8, 0xb9, 0xae][..])
            .execute(&mut other)
            .await
    });
    let sleeps = |session: &Session| session.statement.starts_with("do sleep");
    eventually("the session is listed", async || world.sessions().await.iter().any(sleeps)).await;
    let mut server = server_connection().await;
    kill(&mut server, world.sessions().await.into_iter().filter(sleeps)).await;
    assert!(binds.await.expect("the task does not panic").is_err(), "the session was killed");
}
