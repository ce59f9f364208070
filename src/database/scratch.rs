//! A database for a while, on the same server.

use sqlx::AssertSqlSafe;

use super::{Database, DatabaseError};

impl Database {
    /// Creates a database of this name, which must need no quotes.
    pub(crate) async fn create_scratch(&self, name: &str) -> Result<(), DatabaseError> {
        self.run_ddl(format!("create database {name}")).await
    }

    /// Drops a database that [`Database::create_scratch`] has created.
    pub(crate) async fn drop_scratch(&self, name: &str) -> Result<(), DatabaseError> {
        self.run_ddl(format!("drop database {name}")).await
    }

    async fn run_ddl(&self, sql: String) -> Result<(), DatabaseError> {
        let run = sqlx::raw_sql(AssertSqlSafe(sql));
        self.run_pooled(async |connection| run.execute(connection).await).await?;
        Ok(())
    }
}
