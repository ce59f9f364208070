//! The worker that is never killed: at the end it is alone, all its connections go deaf in the
//! middle of its work, and nobody restarts anything. It must find its way by itself.

use std::time::{Duration, Instant};

use projectionist::sqlx;

use crate::faults::Targets;
use crate::supervisor::Supervisor;

/// A transaction that nobody ends any more holds its row until the server ends it, and an answer is
/// awaited for 60 s.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(180);

/// Between them, writers write and the survivor plays.
const BETWEEN: Duration = Duration::from_secs(2);

const BEHIND: &str = "select count(*) from projectors where name in ('tally', 'counters') \
                      and position < (select max(position) from events)";

/// Deafens it thrice, ends the writing, and waits until those that are never broken are at the end
/// of the log.
pub async fn silence_connections(
    targets: &Targets,
    supervisor: &mut Supervisor,
) -> anyhow::Result<()> {
    for _ in 0..3 {
        tokio::time::sleep(BETWEEN).await;
        targets.figures.add("connections_silenced", targets.database.silence(|| true));
    }
    supervisor.stop_writing().await;
    let began = Instant::now();
    let connection = &mut targets.parts.connect().await?;
    while sqlx::query_scalar::<_, i64>(BEHIND).fetch_one(&mut *connection).await? > 0 {
        if began.elapsed() > RECOVERY_TIMEOUT {
            targets.figures.add_finding(
                "the worker that was never killed did not recover from connections that went deaf",
            );
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    targets.figures.add("survivor_recovered_in_seconds", began.elapsed().as_secs());
    Ok(())
}
