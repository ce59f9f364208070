//! The tables that projectors write: which ones exist, whether they have rows, and the lock under
//! which boot examines them.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use ring::digest::{SHA256, digest};
use sqlx::{AssertSqlSafe, Connection, MySql, MySqlConnection, QueryBuilder, Row};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::database::Database;
use crate::model::wait_log::Reminder;

/// With `lower_case_table_names` = 0, table names are case-sensitive.
const OWN_DATABASE: &str = "select database(), cast(@@lower_case_table_names as signed)";

const TABLES: &str = "\
    select convert(table_schema using utf8mb4), convert(table_name using utf8mb4) \
    from information_schema.tables \
    where table_type = 'BASE TABLE' and table_schema in (";

const TAKE_LOCK: &str = "select get_lock(?, 1)";
const RELEASE_LOCK: &str = "select release_lock(?)";

/// How often the lock's session is pinged. Far below the time after which the server ends an idle
/// session and releases its lock.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// The base tables of some databases, by their names in the ledger: `table` in our own database,
/// `database.table` in others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TableCatalog {
    own_database: String,
    /// The other databases whose tables were read.
    other_databases: BTreeSet<String>,
    ignores_case: bool,
    names: BTreeSet<String>,
}

impl TableCatalog {
    /// Reads the tables of our own database and of the databases in these table names.
    pub(crate) async fn read<'a>(
        database: &Database,
        named: impl Iterator<Item = &'a String>,
    ) -> Result<Self, sqlx::Error> {
        let schema = |table: &'a String| Some(table.split_once('.')?.0.to_owned());
        Self::read_in(database, named.filter_map(schema).collect()).await
    }

    /// Reads the tables of the same databases again.
    pub(crate) async fn reload(&self, database: &Database) -> Result<Self, sqlx::Error> {
        Self::read_in(database, self.other_databases.clone()).await
    }

    async fn read_in(
        database: &Database,
        other_databases: BTreeSet<String>,
    ) -> Result<Self, sqlx::Error> {
        let read = async |connection: &mut MySqlConnection| {
            let (own_database, lower_case): (String, i64) =
                sqlx::query_as(OWN_DATABASE).fetch_one(&mut *connection).await?;
            let mut query = QueryBuilder::<MySql>::new(TABLES);
            query.push_bind(own_database.clone());
            for schema in &other_databases {
                query.push(", ").push_bind(schema.clone());
            }
            query.push(")");
            let rows = query.build().fetch_all(connection).await?;
            let mut tables = TableCatalog {
                own_database,
                other_databases,
                ignores_case: lower_case != 0,
                names: BTreeSet::new(),
            };
            for row in rows {
                let name =
                    format!("{}.{}", row.try_get::<String, _>(0)?, row.try_get::<String, _>(1)?);
                let name = tables.canonical_name(&name);
                tables.names.insert(name);
            }
            Ok(tables)
        };
        database.run_pooled(read).await
    }

    /// The name of a table in the ledger.
    pub(crate) fn canonical_name(&self, table: &str) -> String {
        let name = match table.split_once('.') {
            Some((schema, name)) if schema == self.own_database => name,
            _ => table,
        };
        if self.ignores_case { name.to_lowercase() } else { name.to_owned() }
    }

    /// Whether the table exists.
    pub(crate) fn contains(&self, table: &str) -> bool {
        self.names.contains(&self.canonical_name(table))
    }

    /// The tables that did not exist in `before`.
    pub(crate) fn created_since(&self, before: &TableCatalog) -> Vec<String> {
        self.names.difference(&before.names).cloned().collect()
    }
}

/// Whether a table has at least one row.
pub(crate) async fn has_rows(database: &Database, table: &str) -> Result<bool, sqlx::Error> {
    let quoted: Vec<String> =
        table.splitn(2, '.').map(|name| format!("`{}`", name.replace('`', "``"))).collect();
    let sql = format!("select exists (select 1 from {})", quoted.join("."));
    let has_rows = sqlx::query_scalar::<_, i64>(AssertSqlSafe(sql));
    database
        .run_pooled(async |connection| has_rows.fetch_one(connection).await)
        .await
        .map(|has_rows| has_rows != 0)
}

/// The lock of a boot that examines tables, runs setups and records which tables they created.
/// Without it, another boot would take the newly created tables for existing ones.
///
/// There is one lock per database, because a table does not show which projector's setup created
/// it. If the value is dropped, the lock is released when the server notices that the session has
/// ended.
pub(crate) struct SetupLock {
    session: MySqlConnection,
    name: String,
}

impl SetupLock {
    /// Waits for the lock, at most for `wait_timeout`. Returns `None` if the lock was not released
    /// in that time.
    pub(crate) async fn acquire(
        database: &Database,
        wait_timeout: Option<Duration>,
    ) -> Result<Option<Self>, sqlx::Error> {
        let mut session = database.open_dedicated().await?;
        let name = lock_name(
            &sqlx::query_scalar::<_, String>("select database()").fetch_one(&mut session).await?,
        );
        let began = Instant::now();
        let mut reminder = Reminder::new(began);
        loop {
            let taken: Option<i64> = database
                .with_timeout(sqlx::query_scalar(TAKE_LOCK).bind(&name).fetch_one(&mut session))
                .await?;
            if taken == Some(1) {
                return Ok(Some(SetupLock { session, name }));
            }
            if wait_timeout.is_some_and(|wait_timeout| began.elapsed() >= wait_timeout) {
                return Ok(None);
            }
            if reminder.is_due(Instant::now()) {
                info!(
                    seconds = began.elapsed().as_secs(),
                    "waiting for another boot that is examining tables and running setups"
                );
            }
        }
    }

    /// Runs `work` and keeps the lock's session alive meanwhile.
    pub(crate) async fn run_while_held<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            match timeout(PING_INTERVAL, &mut work).await {
                Ok(done) => return done,
                Err(_) => {
                    if let Ok(Err(error)) = timeout(PING_INTERVAL, self.session.ping()).await {
                        warn!(%error, "lost the lock under which setups run");
                    }
                }
            }
        }
    }

    /// Releases the lock for the next boot.
    pub(crate) async fn release(mut self, database: &Database) {
        // If this fails, the lock is released with the end of the session.
        let _ = database
            .with_timeout(sqlx::query(RELEASE_LOCK).bind(&self.name).execute(&mut self.session))
            .await;
        let _ = timeout(PING_INTERVAL, self.session.close()).await;
    }
}

/// Hashes the database's name, because a lock's name has at most 64 characters and the server
/// ignores its case.
fn lock_name(database: &str) -> String {
    let hash = digest(&SHA256, database.as_bytes());
    let hash: String = hash.as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("projectionist setup {hash}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tables(ignores_case: bool, names: &[&str]) -> TableCatalog {
        let empty = TableCatalog {
            own_database: "app".into(),
            other_databases: BTreeSet::new(),
            ignores_case,
            names: BTreeSet::new(),
        };
        TableCatalog {
            names: names.iter().map(|name| empty.canonical_name(name)).collect(),
            ..empty
        }
    }

    #[test]
    fn a_table_has_one_name_however_it_is_spelled() {
        let exact = tables(false, &["app.Orders", "other.Orders"]);
        assert!(
            exact.contains("Orders")
                && exact.contains("app.Orders")
                && exact.contains("other.Orders")
        );
        assert!(!exact.contains("orders") && !exact.contains("third.Orders"));
        let folded = tables(true, &["app.orders"]);
        assert!(folded.contains("Orders") && folded.contains("app.ORDERS"));
        assert_eq!(
            tables(false, &["app.a", "app.b"]).created_since(&tables(false, &["app.a"])),
            ["b"]
        );
    }

    #[test]
    fn the_lock_name_is_short_enough_and_differs_by_database() {
        let long = "d".repeat(64);
        assert!(lock_name(&long).len() <= 64);
        assert_ne!(lock_name("a"), lock_name("A"));
    }
}
