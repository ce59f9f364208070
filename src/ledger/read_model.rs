//! The tables that projectors write: which there are, whether they hold rows, and the lock under
//! which boot looks.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use ring::digest::{SHA256, digest};
use sqlx::{AssertSqlSafe, Connection, MySql, MySqlConnection, QueryBuilder, Row};
use tokio::time::timeout;
use tracing::{info, warn};

use crate::database::Database;

/// 0: names are compared with their case.
const OWN_DATABASE: &str = "select database(), cast(@@lower_case_table_names as signed)";

const TABLES: &str = "select convert(table_schema using utf8mb4), convert(table_name using utf8mb4) \
                      from information_schema.tables where table_type = 'BASE TABLE' and table_schema in (";

const TAKE_LOCK: &str = "select get_lock(?, 1)";
const RELEASE_LOCK: &str = "select release_lock(?)";

/// Far below the time after which the server ends a session that is silent, and with it the lock.
const PING_INTERVAL: Duration = Duration::from_secs(20);

/// The base tables of some databases, by the names under which the ledger keeps them: `table` in
/// our own database, `database.table` elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TableCatalog {
    own_database: String,
    /// The other databases that were looked at.
    other_databases: BTreeSet<String>,
    ignores_case: bool,
    names: BTreeSet<String>,
}

impl TableCatalog {
    /// Reads the tables of our own database, and of those that these names of tables are in.
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

    /// The name under which a table is kept.
    pub(crate) fn canonical_name(&self, table: &str) -> String {
        let name = match table.split_once('.') {
            Some((schema, name)) if schema == self.own_database => name,
            _ => table,
        };
        if self.ignores_case { name.to_lowercase() } else { name.to_owned() }
    }

    /// Whether there is such a table.
    pub(crate) fn contains(&self, table: &str) -> bool {
        self.names.contains(&self.canonical_name(table))
    }

    /// The tables that were not there `before`.
    pub(crate) fn created_since(&self, before: &TableCatalog) -> Vec<String> {
        self.names.difference(&before.names).cloned().collect()
    }
}

/// Whether a table holds a row.
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

/// Held by the boot that looks at tables, runs setups and records what they made: another boot
/// would take the tables that this one has just created for tables that were always there. One for
/// the whole database, because a table does not tell which projector's setup created it. Dropped,
/// it is released when the server notices.
pub(crate) struct SetupLock {
    session: MySqlConnection,
    name: String,
}

impl SetupLock {
    /// Waits for the lock for as long as `patience` says; `None`: it was not released in that time.
    pub(crate) async fn acquire(
        database: &Database,
        wait_timeout: Option<Duration>,
    ) -> Result<Option<Self>, sqlx::Error> {
        let mut session = database.open_dedicated().await?;
        let name = lock_name(
            &sqlx::query_scalar::<_, String>("select database()").fetch_one(&mut session).await?,
        );
        let began = Instant::now();
        let mut has_logged = false;
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
            if !std::mem::replace(&mut has_logged, true) {
                info!("waiting for another boot, which looks at tables and runs setups");
            }
        }
    }

    /// Does some work, and keeps the lock's session alive meanwhile.
    pub(crate) async fn run_while_held<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = pin!(work);
        loop {
            match timeout(PING_INTERVAL, &mut work).await {
                Ok(done) => return done,
                Err(_) => {
                    if let Ok(Err(error)) = timeout(PING_INTERVAL, self.session.ping()).await {
                        warn!(%error, "the lock under which setups run was lost");
                    }
                }
            }
        }
    }

    /// Gives the lock to the next boot.
    pub(crate) async fn release(mut self, database: &Database) {
        // Where that fails, the end of the session releases it.
        let _ = database
            .with_timeout(sqlx::query(RELEASE_LOCK).bind(&self.name).execute(&mut self.session))
            .await;
        let _ = timeout(PING_INTERVAL, self.session.close()).await;
    }
}

/// A lock's name has at most 64 characters, and the server compares it without its case.
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
