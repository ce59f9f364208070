//! Who is connected to a server, and what each session is at.

use projectionist::sqlx::{self, MySqlConnection, Row, ValueRef};

use super::{World, eventually, server_connection};

/// A session of the server.
#[derive(Debug)]
pub struct Session {
    pub id: u64,
    pub user: String,
    pub database: String,
    pub state: String,
    /// What it runs now; what is no UTF-8 in it is replaced.
    pub statement: String,
}

/// Every session of the server. Not by `information_schema.processlist`: MySQL writes a bound
/// parameter into the statement as it is, and that table then fails with error 3854 if any session
/// of anybody binds bytes that are no UTF-8, as the migrator does with its checksum.
pub async fn sessions(connection: &mut MySqlConnection) -> Vec<Session> {
    let rows =
        sqlx::raw_sql("show full processlist").fetch_all(connection).await.expect("the sessions");
    rows.iter()
        .map(|row| {
            // Servers differ in whether that is signed; and it is not always text.
            let text = |index: usize| {
                let value = row.try_get_raw(index).expect("as many columns");
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

/// Ends these sessions, as far as they have not ended meanwhile.
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
    eventually("it is seen", async || world.sessions().await.iter().any(sleeps)).await;
    let mut server = server_connection().await;
    kill(&mut server, world.sessions().await.into_iter().filter(sleeps)).await;
    assert!(binds.await.expect("no panic").is_err(), "it was killed");
}
