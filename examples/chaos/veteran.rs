//! The worker that is never killed: at the end it is alone, all its connections go deaf in the middle of its work, and nobody
//! restarts anything. It must find its way by itself.

use std::time::{Duration, Instant};

use projectionist::sqlx;

use crate::crew::Crew;
use crate::faults::Targets;

/// A transaction that nobody ends any more holds its row until the server ends it, and an answer is awaited for 60 s.
const RECOVERS_WITHIN: Duration = Duration::from_secs(180);

/// Between them, writers write and the veteran plays.
const BETWEEN: Duration = Duration::from_secs(2);

const BEHIND: &str = "select count(*) from projectors where name in ('tally', 'counters') \
                      and position < (select max(position) from events)";

/// Deafens it thrice, ends the writing, and waits until those that are never broken are at the end of the log.
pub async fn go_deaf(targets: &Targets, crew: &mut Crew) -> anyhow::Result<()> {
    for _ in 0..3 {
        tokio::time::sleep(BETWEEN).await;
        targets.figures.add("connections_deafened", targets.database.deafen(|| true));
    }
    crew.stop_writing().await;
    let began = Instant::now();
    let connection = &mut targets.parts.connect().await?;
    while sqlx::query_scalar::<_, i64>(BEHIND).fetch_one(&mut *connection).await? > 0 {
        if began.elapsed() > RECOVERS_WITHIN {
            targets.figures.find("the worker that was never killed did not recover from connections that went deaf");
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    targets.figures.add("veteran_recovered_in_seconds", began.elapsed().as_secs());
    Ok(())
}
