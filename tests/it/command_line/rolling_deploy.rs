//! As a service on ECS runs: several tasks at once, a health check that looks at the heartbeat,
//! deploys that roll over each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use super::{event_count, tally, tally_positions};
use crate::support::{Folder, ProxyAction, RunningProcess, World, eventually};

/// ECS waits for so long after SIGTERM, unless it is told otherwise, before it kills.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

async fn roll(world: World) {
    let old = Folder::new().with("1.toml", &tally("a")).with("2.toml", &tally("going"));
    let new = Folder::new().with("1.toml", &tally("a")).with("3.toml", &tally("coming"));
    world.append(200).await;
    world.run(&["boot", "--projectors", old.path()]).await.exits(0);
    let worker = |folder: &Folder| {
        world.start(&[
            "play",
            "--message-events=5",
            "--visibility-timeout=10",
            "--projectors",
            folder.path(),
        ])
    };
    let mut workers = vec![worker(&old), worker(&old), worker(&old)];

    let done = AtomicBool::new(false);
    let load = async {
        let mut appended = 200;
        while !done.load(Ordering::SeqCst) || appended < 1_000 {
            world.append(10).await;
            appended += 10;
            // As fast as it is played: what is still to be played at the end would measure the
            // machine.
            let last = world.last_position().await;
            eventually("the workers follow", async || world.position("a").await + 500 >= last)
                .await;
        }
        appended
    };
    let deploy = async {
        eventually("the old release is at work", async || world.position("going").await > 300)
            .await;
        let beside = world.position("a").await;
        world.run(&["boot", "--projectors", new.path()]).await.exits(0);
        assert!(world.position("a").await > beside, "the old release goes on beside the boot");
        // A task of the new release comes, one of the old one goes, as ECS does it.
        for _ in 0..3 {
            workers.push(worker(&new));
            workers.last().expect("the new one").wait_for_log("playing").await;
            let began = Instant::now();
            workers.remove(0).terminate().await.exits(0);
            assert!(began.elapsed() < STOP_TIMEOUT, "{:?}", began.elapsed());
        }
        let last = world.last_position().await;
        eventually("the new release is at work", async || world.position("coming").await > last)
            .await;
        done.store(true, Ordering::SeqCst);
    };
    let (appended, ()) = tokio::join!(load, deploy);
    let last = world.last_position().await;
    eventually("all is played", async || {
        world.position("a").await == last && world.position("coming").await == last
    })
    .await;
    for worker in workers {
        worker.terminate().await.exits(0);
    }
    assert_eq!(event_count(&world).await, appended);
    // Each event once, in order; and of the one that the new release lacks, up to where it stands,
    // too.
    let events = world.positions("event_type not like '$%'").await;
    for name in ["a", "coming"] {
        assert_eq!(tally_positions(&world, name).await, events, "{name}");
    }
    let stands = world.position("going").await;
    let until: Vec<u64> = events.into_iter().filter(|position| *position <= stands).collect();
    assert_eq!(tally_positions(&world, "going").await, until);
}

#[tokio::test]
async fn a_rolling_deploy_under_load_loses_and_repeats_nothing_with_a_fifo_queue() {
    roll(World::new().await).await;
}

#[tokio::test]
async fn a_rolling_deploy_under_load_loses_and_repeats_nothing_with_a_standard_queue() {
    roll(World::with_standard_queue().await).await;
}

/// When the heartbeat was last touched.
fn last_beat(file: &str) -> Option<SystemTime> {
    std::fs::metadata(file).and_then(|file| file.modified()).ok()
}

#[tokio::test]
async fn a_stuck_worker_fails_its_health_check() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let file = folder.file("heartbeat");
    let health = ["health", "--max-age=3", "--heartbeat", &file];
    world.run(&health).await.exits(1).prints(&["no heartbeat", &file]);

    let play = world.start(&["play", "--projectors", folder.path(), "--heartbeat", &file]);
    eventually("its heart beats", async || last_beat(&file).is_some()).await;
    let well = world.run(&health).await.exits(0);
    assert!(
        well.stdout.starts_with("well: ") && well.stdout.lines().count() == 1,
        "{}",
        well.stdout
    );

    play.signal("STOP").await;
    eventually("it is found", async || world.run(&health).await.code == Some(1)).await;
    world.run(&health).await.exits(1).prints(&["stands still"]);
    play.signal("CONT").await;
    eventually("it is well again", async || world.run(&health).await.code == Some(0)).await;
    play.terminate().await.exits(0);
    world.run(&health).await.exits(1).prints(&["no heartbeat"]);

    let nowhere =
        ["play", "--projectors", folder.path(), "--heartbeat", "/no/such/folder/heartbeat"];
    world.run(&nowhere).await.exits(2).prints(&["/no/such/folder/heartbeat", "read-only"]);
}

#[tokio::test]
async fn a_worker_waiting_for_its_database_passes_its_health_check() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let is_away = Arc::new(AtomicBool::new(false));
    let decide = {
        let is_away = Arc::clone(&is_away);
        move |_: &[u8]| {
            if is_away.load(Ordering::SeqCst) { ProxyAction::Reset } else { ProxyAction::Forward }
        }
    };
    let url = world.database_url_through_proxy(decide).await;
    let file = folder.file("heartbeat");
    let play = [
        "play",
        "--receive-wait=1",
        "--reconcile-after=1",
        "--projectors",
        folder.path(),
        "--heartbeat",
        &file,
    ];
    let mut play = world.command(&play);
    play.env("DATABASE_URL", url);
    let play = RunningProcess::spawn(play);
    world.append(5).await;
    eventually("it plays", async || world.position("a").await == 5).await;

    is_away.store(true, Ordering::SeqCst);
    let since = SystemTime::now();
    world.append(5).await;
    let health = ["health", "--max-age=3", "--heartbeat", &file];
    eventually("its heart beats on for longer than it may be still", async || {
        world.run(&health).await.exits(0);
        last_beat(&file).is_some_and(|beat| beat > since + Duration::from_secs(5))
    })
    .await;
    assert_eq!(world.position("a").await, 5);
    is_away.store(false, Ordering::SeqCst);
    eventually("it plays on", async || world.position("a").await == 10).await;
    play.terminate().await.exits(0);
}
