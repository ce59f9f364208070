//! The fence by hand, on which every guarantee depends. A committer locks the row of its position
//! and checks that the position has not changed.

use anyhow::ensure;
use projectionist::sqlx::{self, Connection, MySqlConnection};

use crate::world::World;

const TABLE: &str = "create table if not exists positions \
    (number int unsigned primary key, position bigint unsigned not null)";

const LOCK: &str = "select position from positions where number = ? for update";

const ADVANCE: &str = "update positions set position = ? where number = ? and position = ?";

const ALL: &str = "select number, position from positions";

/// One position with a connection of its own.
pub struct Fence {
    connection: MySqlConnection,
    number: u32,
    position: u64,
}

impl Fence {
    /// Starts before the first event.
    pub async fn new(world: &World, number: u32) -> anyhow::Result<Self> {
        world.execute(TABLE).await?;
        world.execute(&format!("replace into positions values ({number}, 0)")).await?;
        Ok(Fence { connection: world.connection().await?, number, position: 0 })
    }

    /// Reads all positions, as play reads the ledger before it processes messages: only the
    /// database knows what deploys and other workers have changed.
    pub async fn read_all(&mut self) -> anyhow::Result<()> {
        let all: Vec<(u32, u64)> = sqlx::query_as(ALL).fetch_all(&mut self.connection).await?;
        ensure!(
            all.contains(&(self.number, self.position)),
            "the position was changed by another process: {all:?}"
        );
        Ok(())
    }

    /// Advances the position by `events`, in one transaction.
    pub async fn advance(&mut self, events: u64) -> anyhow::Result<()> {
        self.advance_with(events, async |_: &mut MySqlConnection| Ok(())).await
    }

    /// Advances the position by `events`, in one transaction in which `write` runs.
    pub async fn advance_with(
        &mut self,
        events: u64,
        write: impl AsyncFnOnce(&mut MySqlConnection) -> Result<(), sqlx::Error>,
    ) -> anyhow::Result<()> {
        let (from, to) = (self.position, self.position + events);
        let mut transaction = self.connection.begin().await?;
        let found: u64 =
            sqlx::query_scalar(LOCK).bind(self.number).fetch_one(&mut *transaction).await?;
        write(&mut transaction).await?;
        let moved = sqlx::query(ADVANCE)
            .bind(to)
            .bind(self.number)
            .bind(from)
            .execute(&mut *transaction)
            .await?;
        ensure!(
            (found, moved.rows_affected()) == (from, 1),
            "the position is at {found}, not at {from}"
        );
        transaction.commit().await?;
        self.position = to;
        Ok(())
    }
}
