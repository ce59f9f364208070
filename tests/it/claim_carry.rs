//! A projector that is booted alone claims its row for the next batch in the packet that commits
//! the last one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use projectionist::{BootReport, Database, Limits, boot};

use crate::support::{
    Gate, ProxyAction, TIMEOUT, Tally, World, contains_text, eventually, gated, registry,
};

const LIMITS: Limits =
    Limits::new().with_batch(10).with_handler_timeout(TIMEOUT).with_retry_timeout(Some(TIMEOUT));

/// Counts how often a boot with batches of ten claims a row: in its own packet, and in the packet
/// of a commit.
async fn boot_and_count_claims(world: &World, tallies: &[&Tally]) -> (u64, u64) {
    let counts = Arc::new((AtomicU64::new(0), AtomicU64::new(0)));
    let counted = Arc::clone(&counts);
    let url = world
        .database_url_through_proxy(move |bytes| {
            if contains_text(bytes, "; commit; update projectors") {
                counted.1.fetch_add(1, Ordering::SeqCst);
            } else if contains_text(bytes, "update projectors set partially_applied = 1") {
                counted.0.fetch_add(1, Ordering::SeqCst);
            }
            ProxyAction::Forward
        })
        .await;
    let database = Database::connect(&url, 8, TIMEOUT).await.expect("the server answers");
    let report = boot(&database, &registry(tallies), LIMITS, |_| {}).await.expect("boot succeeds");
    assert!(report.is_released(), "{report:?}");
    for tally in tallies {
        world.assert_complete(tally).await;
    }
    (counts.0.load(Ordering::SeqCst), counts.1.load(Ordering::SeqCst))
}

#[tokio::test]
async fn a_lone_projector_commits_and_claims_again_in_one_round_trip() {
    let world = World::new().await;
    world.append(300).await;
    let (alone, with_others) = boot_and_count_claims(&world, &[&Tally::new("alone")]).await;
    // The last commit claims nothing. If the machine stalls for seconds, a claim is released
    // between two batches.
    assert_eq!(alone + with_others, 30);
    assert!(with_others > 15, "{alone} separate claims, {with_others} with a commit");
}

#[tokio::test]
async fn a_handler_with_side_effects_claims_its_row_before_each_event() {
    let world = World::new().await;
    world.append(300).await;
    // Each event has its own transaction, so that a failing event repeats no side effect.
    assert_eq!(
        boot_and_count_claims(&world, &[&Tally::new("mailer").with_side_effects()]).await,
        (300, 0)
    );
}

#[tokio::test]
async fn several_projectors_claim_their_rows_batch_by_batch() {
    let world = World::new().await;
    world.append(300).await;
    assert_eq!(
        boot_and_count_claims(&world, &[&Tally::new("one"), &Tally::new("other")]).await,
        (60, 0)
    );
}

#[tokio::test]
async fn a_waiter_for_the_row_gets_it_between_two_batches() {
    let world = World::new().await;
    let (gate, tally) = (Gate::new(), Tally::new("tally"));
    world.append(300).await;
    let gated =
        projectionist::Registry::new().with(gated(&tally, 155, &gate)).expect("the name is unique");
    let alone = async || -> BootReport {
        boot(&world.database, &gated, LIMITS, |_| {}).await.expect("boot succeeds")
    };
    let retiring = async {
        gate.arrival().await;
        let retiring =
            world.execute("update projectors set status = 'retired' where name = 'tally'");
        let opening = async {
            eventually("retire waits for the row", async || world.lock_waits().await > 0).await;
            gate.open();
        };
        tokio::join!(retiring, opening);
    };
    let (report, ()) = tokio::join!(alone(), retiring);
    // The gated batch was the last.
    assert_eq!(
        (world.status("tally").await, world.position("tally").await),
        ("retired".into(), 160),
        "{report:?}"
    );
    assert_eq!(tally.applied(&world).await, (1..=160).collect::<Vec<u64>>());
}

#[tokio::test]
async fn a_session_killed_between_two_batches_claims_again() {
    let world = World::new().await;
    let ended = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&ended);
    world.append(300).await;
    // The server has committed and claimed the row, but the client gets no answer and the session
    // ends.
    let url = world
        .database_url_through_proxy(move |bytes| {
            if contains_text(bytes, "; commit; update projectors")
                && counted.fetch_add(1, Ordering::SeqCst).is_multiple_of(3)
            {
                ProxyAction::CutAfter
            } else {
                ProxyAction::Forward
            }
        })
        .await;
    let database = Database::connect(&url, 8, TIMEOUT).await.expect("the server answers");
    let tally = Tally::new("tally");
    let report =
        boot(&database, &registry(&[&tally]), LIMITS, |_| {}).await.expect("boot succeeds");
    assert!(report.is_released() && ended.load(Ordering::SeqCst) > 5, "{report:?}");
    world.assert_complete(&tally).await;
}
