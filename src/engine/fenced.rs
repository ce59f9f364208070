//! Applies a batch through a handler whose own transaction moves the projector's position.
//!
//! We hold no lock meanwhile. After an answer, a death or a timeout, the projector's row is read:
//! it alone says whether the batch is committed.

use std::time::{Duration, Instant};

use anyhow::anyhow;
use tracing::warn;

use crate::database::Database;
use crate::engine::apply::{ApplyError, Batch};
use crate::ledger::{Entry, Ledger, fence_sql};
use crate::model::event::Event;
use crate::model::external::{
    Answer, ExternalBatch, ExternalHandler, HandlerFailure, MAX_BATCH_BYTES, NoAnswer,
};
use crate::model::lifecycle::Stage;
use crate::model::metrics;
use crate::model::registry::RegisteredProjector;

/// Applies a batch, in several transactions if its events are large.
pub(super) async fn apply(
    database: &Database,
    projector: &RegisteredProjector,
    handler: &dyn ExternalHandler,
    stage: Stage,
    batch: Batch<'_>,
    time_limit: Duration,
) -> Result<(), ApplyError> {
    let mut rest = Some(batch).filter(|batch| batch.after < batch.through);
    while let Some(batch) = rest {
        let part = first_part(projector, batch);
        apply_part(database, projector, handler, stage, part, time_limit).await?;
        rest = batch.between(part.through, batch.through);
    }
    Ok(())
}

/// The longest beginning of a batch that is sent at once: at least one event.
fn first_part<'a>(projector: &RegisteredProjector, batch: Batch<'a>) -> Batch<'a> {
    let mut bytes = 0;
    let mut last = None;
    for event in batch.wanted(projector) {
        bytes += event.json_bytes();
        match last {
            Some(last) if bytes > MAX_BATCH_BYTES => return batch.up_to(last),
            _ => last = Some(event.position()),
        }
    }
    batch
}

async fn apply_part(
    database: &Database,
    projector: &RegisteredProjector,
    handler: &dyn ExternalHandler,
    stage: Stage,
    part: Batch<'_>,
    time_limit: Duration,
) -> Result<(), ApplyError> {
    let (ledger, began) = (Ledger::new(database), Instant::now());
    let wanted: Vec<&Event> = part.wanted(projector).collect();
    if wanted.is_empty() {
        let moved = ledger.skip_ahead(&[projector], stage, part.after, part.through).await?;
        if moved == 1 {
            return Ok(());
        }
        return Err(ApplyError::ClaimLost(ledger.entry(&projector.id).await?.map(Box::new)));
    }
    let fence = fence_sql(&database.quoted_name(), projector, stage, part.after, part.through);
    let Batch { after, through, .. } = part;
    let sent = ExternalBatch { after, through, fence: Some(&fence), events: &wanted };
    let answer = handler.apply(sent, time_limit).await;
    let entry = ledger.entry(&projector.id).await?;
    judge(answer, entry, projector, stage, part)?;
    metrics::record_applied(&projector.id, wanted.len(), began.elapsed());
    Ok(())
}

/// Decides from the answer and the projector's row, which was read after the answer, whether the
/// batch is applied.
fn judge(
    answer: Result<Answer, NoAnswer>,
    entry: Option<Entry>,
    projector: &RegisteredProjector,
    stage: Stage,
    batch: Batch<'_>,
) -> Result<(), ApplyError> {
    let Some(entry) = entry else { return Err(ApplyError::ClaimLost(None)) };
    let is_ours = stage.can_apply(&entry.status)
        && entry.matches_digest(&projector.digest)
        && entry.rebuild_reason.is_none();
    let position = entry.position;
    if is_ours && position == batch.through {
        return match answer {
            Ok(Answer::Failed(HandlerFailure {
                event: Some(event),
                message,
                retry_after: None,
                ..
            })) => Err(ApplyError::PartiallyApplied(anyhow!(
                "the handler committed the fence before it had applied the events: it failed at \
                 event {event} ({message}), and the position is committed already. The fence and \
                 the handler's writes belong in one transaction. Rebuild the read model"
            ))),
            Ok(Answer::Failed(failure)) => {
                warn!(
                    projector = %projector.id, position = position.get(), error = failure.message,
                    "the handler failed, and its batch is committed by another worker"
                );
                Ok(())
            }
            _ => Ok(()),
        };
    }
    let was_not_moved = (batch.after..batch.through).contains(&position);
    match answer {
        Ok(Answer::Done) if was_not_moved => Err(ApplyError::PartiallyApplied(anyhow!(
            "the handler answered `done`, and the projector's position is {position} instead of \
             {}: its transaction did not begin with the fence, or was rolled back. What it stored \
             has no position. Correct the handler, and rebuild the read model",
            batch.through
        ))),
        // The row was moved by another worker, or is not in this stage any more.
        _ if !is_ours || position != batch.after => {
            Err(ApplyError::ClaimLost(Some(Box::new(entry))))
        }
        Ok(Answer::Done | Answer::NotMine) => Err(ApplyError::Ambiguous(anyhow!(
            "the handler answered `not_mine`, and the projector's row is as the fence requires: \
             the handler did not run the fence as it was sent, or its connection leads to another \
             server"
        ))),
        Ok(Answer::Failed(failure)) => {
            let retry_after = failure.retry_after;
            let error = failure.into_error();
            Err(match retry_after {
                Some(pause) => ApplyError::RetryLater(error, Some(pause)),
                None => ApplyError::Projector(error),
            })
        }
        Err(failure) => Err(match failure {
            NoAnswer::Unsendable(_) => ApplyError::Projector(failure.into_error()),
            NoAnswer::NotStarted(_) => ApplyError::RetryLater(failure.into_error(), None),
            NoAnswer::Ended(_) => ApplyError::RolledBack(failure.into_error()),
            NoAnswer::TimedOut(_) => ApplyError::Ambiguous(failure.into_error()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use sqlx::MySqlConnection;

    use super::*;
    use crate::model::event::Position;
    use crate::model::lifecycle::Status;
    use crate::model::projector::{Mode, Projector};
    use crate::model::registry::Registry;

    struct Example;

    #[async_trait]
    impl Projector for Example {
        fn name(&self) -> &str {
            "example"
        }

        async fn handle(&self, _: &Event, _: &mut MySqlConnection) -> anyhow::Result<()> {
            Ok(())
        }
    }

    /// The verdict on a batch from 10 to 20, for an answer and a row at a position.
    fn verdict(answer: Result<Answer, NoAnswer>, position: u64, status: Status) -> &'static str {
        let registry = Registry::new().with(Example).expect("a name");
        let projector = registry.iter().next().expect("one projector");
        let entry = Entry {
            id: projector.id.clone(),
            mode: Mode::FromBeginning,
            status,
            status_since: time::OffsetDateTime::UNIX_EPOCH,
            position: Position::new(position),
            has_side_effects: false,
            start_position: None,
            digest: Some(projector.digest.clone()),
            event_types: None,
            owned_tables: None,
            rebuild_reason: None,
            retrying: None,
        };
        let (after, through) = (Position::new(10), Position::new(20));
        let batch = Batch { after, through, events: &[] };
        match judge(answer, Some(entry), projector, Stage::Play, batch) {
            Ok(()) => "applied",
            Err(ApplyError::ClaimLost(_)) => "claim lost",
            Err(ApplyError::Projector(_)) => "failed",
            Err(ApplyError::RolledBack(_)) => "rolled back",
            Err(ApplyError::PartiallyApplied(_)) => "rebuild",
            Err(ApplyError::Ambiguous(_)) => "ambiguous",
            Err(ApplyError::RetryLater(..)) => "later",
            Err(error) => panic!("{error:?}"),
        }
    }

    fn failed(event: Option<u64>, retry_after: Option<u64>) -> Result<Answer, NoAnswer> {
        Ok(Answer::Failed(HandlerFailure {
            message: "x".into(),
            event: event.map(Position::new),
            retry_after: retry_after.map(Duration::from_secs),
        }))
    }

    fn ended() -> Result<Answer, NoAnswer> {
        Err(NoAnswer::Ended(anyhow!("it was killed")))
    }

    #[test]
    fn the_row_decides_whether_a_batch_is_applied() {
        let timed_out = || Err(NoAnswer::TimedOut(Duration::from_secs(1)));
        let not_started = || Err(NoAnswer::NotStarted(anyhow!("no such file")));
        let done = || Ok(Answer::Done);
        let not_mine = || Ok(Answer::NotMine);
        for (answer, position, expected) in [
            (done(), 20, "applied"),
            (done(), 10, "rebuild"),
            (done(), 15, "rebuild"),
            (done(), 25, "claim lost"),
            (done(), 5, "claim lost"),
            (not_mine(), 20, "applied"),
            (not_mine(), 15, "claim lost"),
            (not_mine(), 10, "ambiguous"),
            (ended(), 20, "applied"),
            (ended(), 10, "rolled back"),
            (ended(), 25, "claim lost"),
            (timed_out(), 20, "applied"),
            (timed_out(), 10, "ambiguous"),
            (not_started(), 10, "later"),
            (failed(None, None), 10, "failed"),
            (failed(Some(12), None), 10, "failed"),
            (failed(Some(12), Some(1)), 10, "later"),
            (failed(Some(12), None), 20, "rebuild"),
            (failed(Some(12), Some(1)), 20, "applied"),
            (failed(None, None), 20, "applied"),
            (failed(Some(12), None), 15, "claim lost"),
        ] {
            let described = format!("{answer:?} at {position}");
            assert_eq!(verdict(answer, position, Status::Live), expected, "{described}");
        }
    }

    #[test]
    fn a_projector_that_left_the_stage_is_taken_over_whatever_the_handler_answers() {
        for answer in [Ok(Answer::NotMine), ended(), failed(Some(12), None)] {
            for position in [10, 20] {
                let described = format!("{answer:?} at {position}");
                let answer = match &answer {
                    Ok(answer) => Ok(answer.clone()),
                    Err(_) => ended(),
                };
                assert_eq!(verdict(answer, position, Status::Retired), "claim lost", "{described}");
            }
        }
    }
}
