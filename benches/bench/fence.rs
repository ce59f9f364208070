//! The fence that every guarantee rests on, by hand: who commits holds its position's row, and
//! finds it where it was left.

use anyhow::ensure;
use projectionist::sqlx::{self, Connection, MySqlConnection};

use crate::world::World;

const TABLE: &str = "create table if not exists positions (number int unsigned primary key, position bigint unsigned not null)";

const HOLD: &str = "select position from positions where number = ? for update";

const MOVE: &str = "update positions set position = ? where number = ? and position = ?";

const ALL: &str = "select number, position from positions";

/// One position, on a connection of its own.
pub struct Fence {
    connection: MySqlConnection,
    number: u32,
    position: u64,
}

impl Fence {
    /// Before the first event.
    pub async fn new(world: &World, number: u32) -> anyhow::Result<Self> {
        world.execute(TABLE).await?;
        world.execute(&format!("replace into positions values ({number}, 0)")).await?;
        Ok(Fence { connection: world.connection().await?, number, position: 0 })
    }

    /// Asks for whom there is something to do: of what deploys and other workers have changed, only
    /// the database knows.
    pub async fn lock_row(&mut self) -> anyhow::Result<()> {
        let all: Vec<(u32, u64)> = sqlx::query_as(ALL).fetch_all(&mut self.connection).await?;
        ensure!(
            all.contains(&(self.number, self.position)),
            "the position is not where it was left: {all:?}"
        );
        Ok(())
    }

    /// So many events further, in one transaction.
    pub async fn advance(&mut self, events: u64) -> anyhow::Result<()> {
        self.advance_with(events, async |_: &mut MySqlConnection| Ok(())).await
    }

    /// The same, with what is written on the way.
    pub async fn advance_with(
        &mut self,
        events: u64,
        write: impl AsyncFnOnce(&mut MySqlConnection) -> Result<(), sqlx::Error>,
    ) -> anyhow::Result<()> {
        let (from, to) = (self.position, self.position + events);
        let mut transaction = self.connection.begin().await?;
        let found: u64 =
            sqlx::query_scalar(HOLD).bind(self.number).fetch_one(&mut *transaction).await?;
        write(&mut transaction).await?;
        let moved = sqlx::query(MOVE)
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
