//! The worker that is never killed. At the end it is the only worker. All its connections become
//! silent during its work, and no process is restarted: it must recover by itself.

use std::time::{Duration, Instant};

use projectionist::sqlx;

use crate::faults::Targets;
use crate::supervisor::Supervisor;

/// The limit for the recovery. An abandoned transaction locks its row until the server ends it, and
/// the worker waits 60 s for a response.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(180);

/// The pause before each silence. Meanwhile, applications append and the survivor plays.
const BETWEEN: Duration = Duration::from_secs(2);

/// Counts projectors that never break and are not at the end of the log.
const BEHIND: &str = "select count(*) from projectors where name in ('tally', 'counters') \
                      and position < (select max(position) from events)";

/// Silences all connections of the survivor three times, stops the applications, and waits until
/// the projectors that never break are at the end of the log.
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
                "the worker that is never killed did not recover from silent connections",
            );
            break;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    targets.figures.add("survivor_recovered_in_seconds", began.elapsed().as_secs());
    Ok(())
}
