//! The background: a projector that is slow or far behind leaves the fan-out group, delays no
//! other, and is readmitted automatically.

use std::sync::Arc;
use std::time::Duration;

use projectionist::{BackgroundLimits, Database, PlaySettings, Queue, Registry, play};

use crate::support::{
    Gate, ScriptedProjector, TIMEOUT, Tally, World, eventually, registry, registry_of, scripted_at,
};

/// Settings that move a projector to the background soon.
fn low_background_limits() -> PlaySettings {
    World::continuous_play_settings().with_background_after(
        BackgroundLimits::default().with_events(50).with_time(Duration::from_millis(300)),
    )
}

#[tokio::test]
async fn a_slow_projector_delays_no_other_and_is_readmitted() {
    let world = World::new().await;
    let (slow, quick) = (Tally::new("a_slow_one"), Tally::new("quick"));
    let gate = Gate::new();
    let waiting = gate.clone();
    let mut registry = Registry::new();
    registry
        .add(ScriptedProjector::new(&slow, move |_, _| {
            let gate = waiting.clone();
            Box::pin(async move {
                gate.pass().await;
                Ok(())
            })
        }))
        .and_then(|()| registry.add(quick.clone()))
        .expect("the names are unique");
    world.boot(&registry).await;

    let playing = world.start_play_from(
        Arc::clone(&world.queue) as Arc<dyn Queue>,
        &registry,
        low_background_limits(),
    );
    world.append(40).await;
    gate.arrival().await;
    eventually("the quick projector is at 40", || async { world.position("quick").await == 40 })
        .await;
    world.append(40).await;
    eventually("the quick projector continues", || async { world.position("quick").await == 80 })
        .await;
    assert_eq!(
        (world.position("a_slow_one").await, world.status("a_slow_one").await),
        (0, "live".into())
    );

    gate.open();
    eventually("the slow projector is at the end", || async {
        world.position("a_slow_one").await == 80
    })
    .await;
    world.append(40).await;
    eventually("both projectors are played in the group", || async {
        (world.position("a_slow_one").await, world.position("quick").await) == (120, 120)
    })
    .await;
    playing.stop().await;
    world.assert_complete(&slow).await;
    world.assert_complete(&quick).await;
}

#[tokio::test]
async fn a_projector_far_behind_catches_up_in_the_background() {
    let world = World::new().await;
    let (behind, quick) = (Tally::new("behind"), Tally::new("quick"));
    let gate = Gate::new();
    let waiting = gate.clone();
    let mut registry = Registry::new();
    registry
        .add(ScriptedProjector::new(&behind, move |event, _| {
            let (gate, far) = (waiting.clone(), event.position().get() > 100);
            Box::pin(async move {
                if far {
                    gate.pass().await;
                }
                Ok(())
            })
        }))
        .and_then(|()| registry.add(quick.clone()))
        .expect("the names are unique");
    let only_quick = Registry::new().with(quick.clone()).expect("the name is unique");
    world.boot(&registry).await;
    // Meanwhile, an old release plays only the other projector.
    world.append(400).await;
    world.play_until_idle(&only_quick).await;
    assert_eq!((world.position("behind").await, world.position("quick").await), (0, 400));

    let playing = world.start_play_from(
        Arc::clone(&world.queue) as Arc<dyn Queue>,
        &registry,
        low_background_limits(),
    );
    world.append(10).await;
    gate.arrival().await;
    eventually("the other projector is played meanwhile", || async {
        world.position("quick").await == 410
    })
    .await;
    assert!(world.position("behind").await <= 100, "the projector waits at the gate");
    gate.open();
    eventually("the projector is at the end", || async { world.position("behind").await == 410 })
        .await;
    assert_eq!(world.position("quick").await, 410);
    playing.stop().await;
    world.assert_complete(&behind).await;
    world.assert_complete(&quick).await;
}

/// The log's reader waits for its pages to be taken, the handler never returns, and all other
/// sessions are kept open. The task that ends the handler's session must still get a connection.
#[tokio::test]
async fn an_endless_handler_far_behind_is_broken_even_with_the_fewest_connections() {
    let world = World::new().await;
    let (endless, quick) = (Tally::new("endless"), Tally::new("quick"));
    let registry = registry_of([
        scripted_at(&endless, 21, |_| Box::pin(std::future::pending())),
        scripted_at(&quick, 0, |_| Box::pin(async { Ok(()) })),
    ]);
    world.append(20).await;
    assert!(world.boot(&registry).await.is_released());
    world.append(2_000).await;

    let database =
        Database::connect(&world.database_url, 4, TIMEOUT).await.expect("the server answers");
    let limits = World::continuous_play_settings()
        .limits
        .with_batch(100)
        .with_handler_timeout(Duration::from_secs(1));
    let settings = low_background_limits().with_limits(limits);
    let both = async {
        eventually("the endless projector is broken", async || {
            world.status("endless").await == "broken"
        })
        .await;
        eventually("the other projector is at the end", async || {
            world.position("quick").await == 2_020
        })
        .await;
    };
    let played =
        play(&database, Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, settings, both)
            .await;
    assert_eq!(played.expect("play succeeds").broken, 1);
    world.assert_broken("endless", 21, "took longer than").await;
    world.assert_complete(&quick).await;
}

#[tokio::test]
async fn a_projector_that_breaks_in_the_background_is_counted_and_breaks_alone() {
    let world = World::new().await;
    let (behind, quick) = (Tally::new("behind").failing_at(250), Tally::new("quick"));
    let registry = Registry::new()
        .with(behind.clone())
        .and_then(|r| r.with(quick.clone()))
        .expect("the names are unique");
    world.boot(&registry).await;
    world.append(400).await;
    world.play_until_idle(&Registry::new().with(quick.clone()).expect("the name is unique")).await;

    let settings = low_background_limits().with_until_idle(true);
    let playing =
        world.start_play_from(Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, settings);
    eventually("play is idle", || async { !playing.is_running() }).await;
    let played = playing.stop().await;
    assert_eq!((played.broken, world.position("behind").await), (1, 249));
    world.assert_folded(&behind).await;
    world.assert_complete(&quick).await;
}

/// One statement advances all such projectors. It does not move a projector at another position or
/// one that is not live.
#[tokio::test]
async fn projectors_without_matching_events_advance_from_their_own_positions() {
    let world = World::new().await;
    let all = Tally::new("everything");
    let idle =
        ["ahead", "behind", "beside", "leaving"].map(|name| Tally::new(name).only(&["Never"]));
    let registry = registry(&[&idle[0], &all, &idle[1], &idle[2], &idle[3]]);
    world.boot(&registry).await;
    world.append(40).await;
    // As if other workers had advanced some of them, and a boot of another release were running.
    world.execute("update projectors set position = 7 where name = 'ahead'").await;
    world.execute("update projectors set position = 3 where name in ('behind', 'beside')").await;
    world.execute("update projectors set status = 'stalled' where name = 'leaving'").await;
    assert_eq!(world.play_until_idle(&registry).await.broken, 0);
    for tally in [&all, &idle[0], &idle[1], &idle[2]] {
        world.assert_complete(tally).await;
    }
    assert_eq!(
        (world.position("leaving").await, world.status("leaving").await),
        (0, "stalled".into())
    );
}

/// The server is asked only for the subscribed events.
#[tokio::test]
async fn projectors_with_few_event_types_skip_the_others_in_boot_and_miss_none() {
    let world = World::new().await;
    let (opened, closed) =
        (Tally::new("opened").only(&["Opened"]), Tally::new("closed").only(&["Closed"]));
    let never = Tally::new("never").only(&["Never"]);
    world.append(1_000).await;
    let first = registry(&[&opened]);
    world.boot(&first).await;
    world.append(700).await;
    // The projectors are behind by different amounts and subscribe to different events.
    world.execute("update projectors set status = 'stalled' where name = 'opened'").await;
    let report = world.boot(&registry(&[&never, &closed, &opened])).await;
    assert!(report.is_released(), "{report:?}");
    for tally in [&opened, &closed, &never] {
        world.assert_complete(tally).await;
    }
}
