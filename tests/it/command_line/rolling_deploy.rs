//! A service as on ECS: several concurrent tasks, a health check of the heartbeat file, and rolling
//! deploys.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use super::{event_count, tally, tally_positions};
use crate::support::{Folder, ProxyAction, RunningProcess, World, eventually};

/// The default time that ECS waits between SIGTERM and SIGKILL.
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
            // Appends at the speed of the workers. Otherwise, the test would measure the machine.
            let last = world.last_position().await;
            eventually("the workers keep up", async || world.position("a").await + 500 >= last)
                .await;
        }
        appended
    };
    let deploy = async {
        eventually("the old release plays", async || world.position("going").await > 300).await;
        let beside = world.position("a").await;
        world.run(&["boot", "--projectors", new.path()]).await.exits(0);
        assert!(world.position("a").await > beside, "the old release must play during the boot");
        // As on ECS, a task of the new release starts and one of the old release ends.
        for _ in 0..3 {
            workers.push(worker(&new));
            workers.last().expect("a worker was started").wait_for_log("playing").await;
            let began = Instant::now();
            workers.remove(0).terminate().await.exits(0);
            assert!(began.elapsed() < STOP_TIMEOUT, "{:?}", began.elapsed());
        }
        let last = world.last_position().await;
        eventually("the new release plays", async || world.position("coming").await > last).await;
        done.store(true, Ordering::SeqCst);
    };
    let (appended, ()) = tokio::join!(load, deploy);
    let last = world.last_position().await;
    eventually("all events are played", async || {
        world.position("a").await == last && world.position("coming").await == last
    })
    .await;
    for worker in workers {
        worker.terminate().await.exits(0);
    }
    assert_eq!(event_count(&world).await, appended);
    // Each event once, in order. The projector that the new release lacks has the events up to its
    // position.
    let events = world.positions("event_type not like '$%'").await;
    for name in ["a", "coming"] {
        assert_eq!(tally_positions(&world, name).await, events, "{name}");
    }
    let last = world.position("going").await;
    let until: Vec<u64> = events.into_iter().filter(|position| *position <= last).collect();
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

/// The time of the last heartbeat.
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
    eventually("the heartbeat file exists", async || last_beat(&file).is_some()).await;
    let healthy = world.run(&health).await.exits(0);
    assert!(
        healthy.stdout.starts_with("healthy: ") && healthy.stdout.lines().count() == 1,
        "{}",
        healthy.stdout
    );

    play.signal("STOP").await;
    eventually("the health check fails", async || world.run(&health).await.code == Some(1)).await;
    world.run(&health).await.exits(1).prints(&["loop has stopped"]);
    play.signal("CONT").await;
    eventually("the health check passes again", async || world.run(&health).await.code == Some(0))
        .await;
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
    eventually("the worker plays", async || world.position("a").await == 5).await;

    is_away.store(true, Ordering::SeqCst);
    let since = SystemTime::now();
    world.append(5).await;
    let health = ["health", "--max-age=3", "--heartbeat", &file];
    eventually("the heartbeat continues beyond the allowed age", async || {
        world.run(&health).await.exits(0);
        last_beat(&file).is_some_and(|beat| beat > since + Duration::from_secs(5))
    })
    .await;
    assert_eq!(world.position("a").await, 5);
    is_away.store(false, Ordering::SeqCst);
    eventually("the worker continues", async || world.position("a").await == 10).await;
    play.terminate().await.exits(0);
}
