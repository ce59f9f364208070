//! Prepared statements of projectors in Rust. Closing one delays the next statement by 40 ms.

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection, Row};
use projectionist::{Event, Limits, Projector, Registry, async_trait, boot};

use crate::support::World;

/// Runs a statement of its own text for each event, and fails if the session has closed any.
struct ManyTexts;

#[async_trait]
impl Projector for ManyTexts {
    fn name(&self) -> &str {
        "many_texts"
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        let sql = format!("select {} + ?", event.position());
        sqlx::query(AssertSqlSafe(sql)).bind(1).fetch_one(&mut *db).await?;
        let closed = sqlx::raw_sql("show session status like 'Com_stmt_close'").fetch_one(db);
        let closed: String = closed.await?.try_get(1)?;
        anyhow::ensure!(closed == "0", "{closed} statements are closed at {}", event.position());
        Ok(())
    }
}

#[tokio::test]
async fn a_session_with_many_prepared_statements_is_replaced_before_it_closes_one() {
    let world = World::new().await;
    world.append(1_500).await;
    let registry = Registry::new().with(ManyTexts).expect("a name");
    let limits = Limits::default().with_batch(300);
    let report = boot(&world.database, &registry, limits, |_| {}).await.expect("boot ends");
    assert!(report.is_released(), "{}", report.explain());
    assert_eq!(world.position("many_texts").await, 1_500);
}
