//! The main path: boot and play until the read models are complete.

use std::sync::{Arc, Condvar, Mutex};

use projectionist::{Limits, Mode, Queue, RelaySettings, anyhow, boot};

use crate::support::{TIMEOUT, Tally, World, registry, registry_of, scripted_at};

#[tokio::test]
async fn read_models_after_boot_and_play_equal_the_fold_of_the_log() {
    for world in [World::new().await, World::with_standard_queue().await] {
        let (all, closed) = (Tally::new("all_events"), Tally::new("closed").only(&["Closed"]));
        let registry = registry(&[&all, &closed]);
        world.append(250).await;
        assert!(world.boot(&registry).await.is_released());
        assert_eq!(world.status("all_events").await, "live");
        world.assert_complete(&all).await;

        world.append(250).await;
        let played = world.play_until_idle(&registry).await;
        assert!(played.messages > 0, "the events must come through the queue");
        world.assert_complete(&all).await;
        world.assert_complete(&closed).await;
    }
}

/// A batch of no events would move the position without applying an event.
#[tokio::test]
async fn a_batch_limit_of_zero_counts_as_one() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = registry(&[&tally]);
    let limits = Limits::default().with_batch(0);
    world.append(10).await;
    assert!(
        boot(&world.database, &registry, limits, |_| {})
            .await
            .expect("boot succeeds")
            .is_released()
    );
    world.append(10).await;
    let relay = Some(RelaySettings::default().with_max_events(0));
    let settings = World::play_settings().with_limits(limits).with_relay(relay);
    let played =
        world.play_with(Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, settings).await;
    assert_eq!(played.messages, 10);
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_projector_from_now_never_sees_an_older_event_and_once_never_runs_twice() {
    let world = World::new().await;
    let (now, once) =
        (Tally::new("from_now").mode(Mode::FromNow), Tally::new("once").mode(Mode::Once));
    let registry = registry(&[&now, &once]);
    world.append(30).await;
    world.boot(&registry).await;
    assert_eq!(
        (world.status("from_now").await, world.status("once").await),
        ("live".into(), "finished".into())
    );

    world.append(20).await;
    world.boot(&registry).await;
    world.play_until_idle(&registry).await;
    assert_eq!(now.applied(&world).await, (31..=50).collect::<Vec<_>>());
    assert_eq!(once.applied(&world).await, (1..=30).collect::<Vec<_>>());
}

/// A handler that computes blocks its thread. Here, two handlers block until both run.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn handlers_of_one_boot_compute_at_the_same_time() {
    let world = World::new().await;
    let tallies = [Tally::new("one"), Tally::new("other")];
    let running = Arc::new((Mutex::new(0), Condvar::new()));
    let projectors = tallies.each_ref().map(|tally| {
        let running = Arc::clone(&running);
        scripted_at(tally, 1, move |_| {
            let running = Arc::clone(&running);
            Box::pin(async move {
                let (count, changed) = &*running;
                let mut count = count.lock().expect("no handler panics");
                *count += 1;
                changed.notify_all();
                let alone = |count: &mut i32| *count < 2;
                let (_count, waited) =
                    changed.wait_timeout_while(count, TIMEOUT / 2, alone).expect("no panic");
                anyhow::ensure!(!waited.timed_out(), "the other handler does not run");
                Ok(())
            })
        })
    });
    world.append(10).await;
    let report = world.boot(&registry_of(projectors)).await;
    assert!(report.is_released(), "{report:?}");
    for tally in &tallies {
        world.assert_complete(tally).await;
    }
}
