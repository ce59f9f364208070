//! The fence: each event is applied once, by one worker, completely or not at all. This holds with
//! concurrent workers and with lost connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use projectionist::sqlx;
use projectionist::{Database, Error, Limits, Mode, Queue, Registry, boot};

use crate::support::{
    Faults, FaultyQueue, Gate, RandomCuts, ScriptedProjector, TIMEOUT, Tally, World, connect,
    eventually, gated, kill, registry, registry_of, run, scripted_at, seed, server_url,
};

// Concurrent workers and boots.

#[tokio::test]
async fn two_concurrent_workers_apply_each_event_once() {
    let world = World::with_standard_queue().await;
    let (all, closed) = (Tally::new("all_events"), Tally::new("closed").only(&["Closed"]));
    let registry = registry(&[&all, &closed]);
    world.boot(&registry).await;
    let seed = seed();
    // Half of the messages that one worker has applied are received again, by either worker.
    let faults = Faults { undeleted: 50, shuffled: true, ..Faults::default() };
    let queues =
        [seed, seed + 1].map(|seed| Arc::new(FaultyQueue::new(&world.queue, faults, seed)));
    let settings =
        World::continuous_play_settings().with_reconcile_after(Duration::from_millis(50));
    let workers =
        queues.clone().map(|queue| world.start_play_from(queue, &registry, settings.clone()));
    for _ in 0..40 {
        world.append(10).await;
    }
    eventually("all events are applied and all messages deleted", async || {
        world.position("all_events").await == 400
            && world.position("closed").await == 400
            && world.queue.depth().await.is_ok_and(|depth| depth == 0)
    })
    .await;
    for worker in workers {
        assert_eq!(worker.stop().await.broken, 0);
    }
    assert!(
        queues.iter().all(|queue| queue.fault_counts().received > 5),
        "a worker received too few messages"
    );
    world.assert_complete(&all).await;
    world.assert_complete(&closed).await;
}

#[tokio::test]
async fn two_concurrent_boots_apply_each_event_once_and_both_succeed() {
    let world = World::new().await;
    let (gate, first, second) = (Gate::new(), Tally::new("first"), Tally::new("second"));
    let once = Tally::new("once").mode(Mode::Once);
    let registry =
        Registry::new().with(gated(&first, 150, &gate)).and_then(|set| set.with(second.clone()));
    let registry = registry.and_then(|set| set.with(once.clone())).expect("the names are unique");
    world.append(400).await;
    let overlap = async {
        gate.arrival().await;
        eventually("the other boot waits for this one's row", async || {
            world.lock_waits().await > 0
        })
        .await;
        gate.open();
    };
    let (one, other, ()) = tokio::join!(world.boot(&registry), world.boot(&registry), overlap);
    assert!(one.is_released() && other.is_released());
    for tally in [&first, &second, &once] {
        world.assert_complete(tally).await;
    }
    assert_eq!(world.status("once").await, "finished");
}

// Which projectors are played.

#[tokio::test]
async fn a_projector_booted_while_play_runs_joins_without_a_restart() {
    let world = World::new().await;
    let (old, new) = (Tally::new("old"), Tally::new("new"));
    let both = registry(&[&old, &new]);
    world.boot(&registry(&[&old])).await;
    let playing = world.start_play(&both);
    world.append(50).await;
    eventually("the old projector is played", async || world.position("old").await == 50).await;
    assert_eq!(world.status("new").await, "new");

    assert!(world.boot(&both).await.is_released());
    world.append(50).await;
    eventually("the new projector is played", async || world.position("new").await == 100).await;
    assert!(playing.is_running());
    playing.stop().await;
    world.assert_complete(&new).await;
    eventually("the old projector is played, too", async || world.position("old").await == 100)
        .await;
    world.assert_complete(&old).await;
}

#[tokio::test]
async fn an_unbooted_projector_is_never_played() {
    let world = World::new().await;
    let shown = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&shown);
    let unbooted = Tally::new("unbooted").hook(move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    let booted = Tally::new("booted");
    world.append(20).await;
    world.boot(&registry(&[&booted])).await;
    world.append(20).await;
    let played = world.play_until_idle(&registry(&[&unbooted, &booted])).await;
    assert!(played.messages > 0);
    assert_eq!((world.status("unbooted").await, shown.load(Ordering::SeqCst)), ("new".into(), 0));
    world.assert_complete(&booted).await;
}

#[tokio::test]
async fn a_stalled_or_broken_projector_is_not_played_until_it_is_booted() {
    let world = World::new().await;
    let (poisoned, repaired, other) =
        (Tally::new("tally").failing_at(5), Tally::new("tally"), Tally::new("other"));
    world.append(10).await;
    assert!(!world.boot(&registry(&[&poisoned, &other])).await.is_released());
    let repaired_set = registry(&[&repaired, &other]);
    world.append(10).await;
    world.play_until_idle(&repaired_set).await;
    assert_eq!(
        (world.status("tally").await, world.status("other").await),
        ("broken".into(), "stalled".into())
    );
    assert_eq!(world.position("tally").await, 4);

    assert!(world.boot(&repaired_set).await.is_released());
    world.assert_complete(&repaired).await;
    world.assert_complete(&other).await;
}

#[tokio::test]
async fn a_live_projector_retired_while_play_runs_stops() {
    for side_effects in [false, true] {
        let world = World::new().await;
        let (stays, goes) = (Tally::new("stays"), Tally::new("goes"));
        let goes = if side_effects { goes.with_side_effects() } else { goes };
        let both = registry(&[&goes, &stays]);
        world.boot(&both).await;
        let playing = world.start_play(&both);
        world.append(20).await;
        eventually("both are played", async || {
            world.position("stays").await == 20 && world.position("goes").await == 20
        })
        .await;
        // Retired by a release without the projector, so that its table stays and shows any later
        // write.
        world.run(&["retire", "goes", "--yes"]).await.exits(0);
        world.append(20).await;
        eventually("the other projector continues", async || world.position("stays").await == 40)
            .await;
        world.boot(&both).await;
        let expected = if side_effects { "retired" } else { "live" };
        assert_eq!(
            world.status("goes").await,
            expected,
            "without side effects it is booted anew; with side effects it stays retired"
        );
        playing.stop().await;
        let again = if side_effects { 0 } else { 40 };
        assert_eq!(goes.applied(&world).await.len(), 20 + again);
    }
}

#[tokio::test]
async fn a_projector_retired_while_boot_runs_is_dropped_from_the_boot() {
    let world = World::new().await;
    let (gate, tally, other) = (Gate::new(), Tally::new("tally"), Tally::new("other"));
    let registry =
        Registry::new().with(gated(&tally, 10, &gate)).and_then(|set| set.with(other.clone()));
    let registry = registry.expect("the names are unique");
    world.append(10).await;
    let booting =
        async { tokio::time::timeout(TIMEOUT, world.boot(&registry)).await.expect("boot ends") };
    let retiring = async {
        gate.arrival().await;
        let opening = async {
            // Retire waits for the row before the handoff does.
            eventually("retire waits for the row", async || world.lock_waits().await == 1).await;
            gate.open();
        };
        tokio::join!(world.run(&["retire", "tally", "--yes"]), opening).0.exits(0);
    };
    let (report, ()) = tokio::join!(booting, retiring);
    assert_eq!(world.status("tally").await, "new", "the projector has no row");
    let of_it = report.projectors.iter().find(|booted| booted.id.name == "tally");
    assert!(of_it.is_some_and(|booted| ["new", "retired"].contains(&booted.status())), "{of_it:?}");
    world.assert_complete(&other).await;
}

#[tokio::test]
async fn a_changed_mode_without_a_new_version_is_refused() {
    let world = World::new().await;
    world.append(10).await;
    world.boot(&registry(&[&Tally::new("tally")])).await;
    for mode in [Mode::FromNow, Mode::Once] {
        let changed = registry(&[&Tally::new("new_one"), &Tally::new("tally").mode(mode)]);
        let refused = boot(&world.database, &changed, Limits::default(), |_| {}).await;
        let Err(Error::Input(reason)) = refused else { panic!("{refused:?}") };
        assert!(reason.contains("tally@1") && reason.contains("new version"), "{reason}");
        assert_eq!(
            (world.status("tally").await, world.status("new_one").await),
            ("live".into(), "new".into())
        );
    }
}

#[tokio::test]
async fn a_projector_booted_beside_an_old_release_misses_no_event() {
    let world = World::new().await;
    let (old, new) = (Tally::new("old"), Tally::new("new"));
    let (old_release, new_release) = (registry(&[&old]), registry(&[&old, &new]));
    world.append(100).await;
    world.boot(&old_release).await;
    let old_worker = world.start_play(&old_release);
    let appending = async {
        for _ in 0..30 {
            world.append(5).await;
        }
    };
    let (report, ()) = tokio::join!(world.boot(&new_release), appending);
    assert!(report.is_released());
    let handed_over_at = world.position("new").await;
    world.append(50).await;
    eventually("the old release has emptied the queue", async || {
        world.position("old").await == 300
            && world.queue.depth().await.is_ok_and(|depth| depth == 0)
    })
    .await;
    assert!(old_worker.stop().await.messages > 0);
    assert_eq!(
        world.position("new").await,
        handed_over_at,
        "an old release must not play a projector that it does not know"
    );
    assert!(handed_over_at <= 250, "some messages must be gone before the new release plays");

    world.play_until_idle(&new_release).await;
    world.assert_complete(&old).await;
    world.assert_complete(&new).await;
}

// Lost connections.

/// Waits at the gate at one position, and stores the id of its session.
fn gated_in_session(
    tally: &Tally,
    position: u64,
    gate: &Gate,
    session: &Arc<AtomicU64>,
) -> ScriptedProjector {
    let (gate, session) = (gate.clone(), Arc::clone(session));
    scripted_at(tally, position, move |db| {
        let (gate, session) = (gate.clone(), Arc::clone(&session));
        Box::pin(async move {
            let own: u64 = sqlx::query_scalar("select cast(connection_id() as unsigned)")
                .fetch_one(&mut *db)
                .await?;
            session.store(own, Ordering::SeqCst);
            gate.pass().await;
            run(db, "select 1").await
        })
    })
}

#[tokio::test]
async fn a_connection_killed_in_a_transaction_breaks_no_projector() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    for (position, in_boot) in [(150, true), (250, false)] {
        let (gate, session) = (Gate::new(), Arc::new(AtomicU64::new(0)));
        let registry = registry_of([gated_in_session(&tally, position, &gate, &session)]);
        world.append(200).await;
        let killing = async {
            gate.arrival().await;
            let killed = session.load(Ordering::SeqCst);
            world.execute(&format!("kill {killed}")).await;
            gate.open();
            eventually("the handler runs in another session", async || {
                session.load(Ordering::SeqCst) != killed
            })
            .await;
        };
        if in_boot {
            assert!(tokio::join!(world.boot(&registry), killing).0.is_released());
        } else {
            assert_eq!(tokio::join!(world.play_until_idle(&registry), killing).0.broken, 0);
        }
        world.assert_complete(&tally).await;
    }
}

/// Kills random sessions until `stop` is set. Waits for some applied events between two kills, so
/// that a slow server still makes progress. Returns the number of killed sessions.
async fn kill_at_random(
    world: &World,
    mut dice: fastrand::Rng,
    shown: &AtomicU64,
    stop: &AtomicBool,
) -> u64 {
    let mut killer = connect(&server_url()).await;
    let mut killed = 0;
    while !stop.load(Ordering::SeqCst) {
        if let Some(session) = dice.choice(world.sessions().await) {
            killed += kill(&mut killer, [session]).await as u64;
        }
        let next = shown.load(Ordering::SeqCst) + dice.u64(20..80);
        eventually("more events are applied", async || {
            stop.load(Ordering::SeqCst) || shown.load(Ordering::SeqCst) >= next
        })
        .await;
    }
    killed
}

#[tokio::test]
async fn sessions_killed_at_random_break_no_projector() {
    let world = World::new().await;
    let mut dice = fastrand::Rng::with_seed(seed());
    let shown = Arc::new(AtomicU64::new(0));
    let counted = |tally: Tally| {
        let shown = Arc::clone(&shown);
        tally.hook(move |_| {
            shown.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })
    };
    let tallies = [
        Tally::new("all_events"),
        Tally::new("closed").only(&["Closed"]),
        Tally::new("once").mode(Mode::Once),
    ];
    let tallies = tallies.map(counted);
    let registry = registry(&[&tallies[0], &tallies[1], &tallies[2]]);
    world.append(1_500).await;
    let limits = Limits::default().with_batch(20).with_retry_timeout(Some(TIMEOUT));

    let stop = AtomicBool::new(false);
    let booting = async {
        let report = boot(&world.database, &registry, limits, |_| {}).await;
        stop.store(true, Ordering::SeqCst);
        report.expect("boot succeeds")
    };
    let (report, killed) =
        tokio::join!(booting, kill_at_random(&world, dice.fork(), &shown, &stop));
    assert!(report.is_released() && killed > 2, "{killed} sessions killed: {report:?}");
    for tally in &tallies {
        world.assert_complete(tally).await;
    }

    world.append(500).await;
    stop.store(false, Ordering::SeqCst);
    let playing = async {
        let settings = World::play_settings().with_limits(limits);
        let played =
            world.play_with(Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, settings).await;
        stop.store(true, Ordering::SeqCst);
        played
    };
    let (played, killed) =
        tokio::join!(playing, kill_at_random(&world, dice.fork(), &shown, &stop));
    assert!(played.broken == 0 && killed > 2, "{killed} sessions killed: {played:?}");
    world.assert_complete(&tallies[0]).await;
    world.assert_complete(&tallies[1]).await;
}

#[tokio::test]
async fn a_commit_with_a_lost_acknowledgement_is_neither_missed_nor_repeated() {
    let world = World::new().await;
    let cuts = RandomCuts::new(30, seed());
    let cutting = Arc::clone(&cuts);
    let url = world.database_url_through_proxy(move |bytes| cutting.decide(bytes)).await;
    let database = Database::connect(&url, 8, TIMEOUT).await.expect("the server answers");
    let tallies = [
        Tally::new("all_events"),
        Tally::new("closed").only(&["Closed"]),
        Tally::new("once").mode(Mode::Once),
    ];
    let registry = registry(&[&tallies[0], &tallies[1], &tallies[2]]);
    world.append(300).await;
    let limits = Limits::default().with_batch(10).with_retry_timeout(Some(TIMEOUT));
    let report = boot(&database, &registry, limits, |_| {}).await.expect("boot succeeds");
    assert!(report.is_released(), "{report:?}");
    let (before, after) = cuts.counts();
    assert!(before > 3 && after > 3, "connections closed in boot: {before} before, {after} after");
    for tally in &tallies {
        world.assert_complete(tally).await;
    }

    world.append(300).await;
    let settings = World::play_settings().with_limits(limits);
    let playing = projectionist::play(
        &database,
        Arc::clone(&world.queue) as Arc<dyn Queue>,
        &registry,
        settings,
        std::future::pending(),
    );
    let played = tokio::time::timeout(TIMEOUT, playing)
        .await
        .expect("play becomes idle")
        .expect("play succeeds");
    assert_eq!(played.broken, 0);
    let (in_play_before, in_play_after) = cuts.counts();
    assert!(
        in_play_before > before + 3 && in_play_after > after + 3,
        "{} commits",
        cuts.commit_count()
    );
    world.assert_complete(&tallies[0]).await;
    world.assert_complete(&tallies[1]).await;
}
