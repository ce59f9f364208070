//! The relay: with a blocked mark, with a lease that expires too far in the future, and after a
//! panic.

use std::sync::Arc;
use std::time::{Duration, Instant};

use projectionist::Queue;

use crate::support::{
    Faults, FaultyQueue, Folder, RunningProcess, TIMEOUT, Tally, World, eventually, execute,
    registry, schedule, write,
};

#[tokio::test]
async fn a_lease_from_the_future_has_expired() {
    let world = World::new().await;
    world.append(5).await;
    let lease = async |until: &str| {
        world
            .execute(&format!(
                "update event_log set relay_lease_holder = 'another', \
                 relay_lease_expires_at = {until}"
            ))
            .await;
    };
    lease("utc_timestamp(6) + interval 1 hour").await;
    let relayed = world.run(&["relay", "--once"]).await.exits(0);
    assert_eq!(relayed.stdout, "published 5 events, up to position 5\n");
    // A plausible lease is respected.
    world.append(5).await;
    lease("utc_timestamp(6) + interval 4 second").await;
    let began = Instant::now();
    world.run(&["relay", "--once"]).await.exits(0);
    assert!(began.elapsed() > Duration::from_secs(2), "the relay waits for a plausible lease");
}

#[tokio::test]
async fn relay_once_ends_beside_a_relay_that_has_published_everything() {
    let world = World::new().await;
    world.append(3).await;
    let relay = world.start(&["relay"]);
    eventually("the events are published", async || {
        world.number("select published from event_log").await == 3
    })
    .await;
    let relayed = world.run(&["relay", "--once"]).await.exits(0);
    assert_eq!(relayed.stdout, "published 0 events, up to position 3\n");
    relay.terminate().await.exits(0);
}

#[tokio::test]
async fn a_panicking_relay_restarts_and_publishes_everything() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    world.boot(&registry(&[&tally])).await;
    world.append(50).await;
    let faults = Faults { panics: 2, ..Faults::default() };
    let queue = Arc::new(FaultyQueue::new(&world.queue, faults, 0));
    world.play_from(Arc::clone(&queue) as Arc<dyn Queue>, &registry(&[&tally])).await;
    assert_eq!(queue.fault_counts().panics, 2, "every planned panic happened");
    assert_eq!(world.number("select published from event_log").await, 50);
    world.assert_complete(&tally).await;
}

/// The processor time that a process has used.
fn processor_time(process: &RunningProcess) -> Duration {
    let stat =
        std::fs::read_to_string(format!("/proc/{}/stat", process.id())).expect("it is running");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let ticks: u64 =
        fields[11..=12].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    // The kernel reports ticks of a hundredth of a second on every machine.
    Duration::from_millis(ticks * 10)
}

/// Such a worker once used two thirds of a core: each check read a page of the log several times.
#[tokio::test]
async fn a_worker_with_a_blocked_mark_is_nearly_idle_and_resumes_at_once() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let folder = Folder::new().with("tally.toml", &tally.file(&[]));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    for ends_by in ["commit", "rollback"] {
        let mut open = world.connection().await;
        execute(&mut open, "begin").await;
        write(&mut open, ends_by, 1).await.expect("written");
        world.append(1_000).await;
        let play = world.start(&["play", "--projectors", folder.path()]);
        // A stored `blocked_since` means that the mark has been blocked for a while.
        eventually("the mark is blocked", async || {
            world.number("select count(blocked_since) from event_log").await == 1
        })
        .await;
        let (before, began) = (processor_time(&play), Instant::now());
        tokio::time::sleep(Duration::from_secs(4)).await;
        let share = (processor_time(&play) - before).as_secs_f64() / began.elapsed().as_secs_f64();
        eprintln!("{:.0}% of a core while the mark is blocked", share * 100.0);
        assert!(share < 0.2, "{share} of a core while the mark is blocked");

        execute(&mut open, ends_by).await;
        let last = world.last_position().await;
        let free = Instant::now();
        eventually("the mark rises", async || world.high_water().await == last).await;
        assert!(free.elapsed() < Duration::from_secs(5), "{:?} after a {ends_by}", free.elapsed());
        assert_eq!(
            world.number("select count(blocked_since) from event_log").await,
            0,
            "a mark that rises is not blocked"
        );
        eventually("the events are played", async || world.position("tally").await == last).await;
        play.terminate().await.exits(0);
    }
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_stored_blocker_is_cleared_if_nothing_is_visible_above_the_mark() {
    let world = World::new().await;
    world.append(3).await;
    world.run(&["relay", "--once"]).await.exits(0);
    world
        .execute(
            "update event_log set blocked_position = 4, \
             blocked_since = utc_timestamp(6) - interval 1 hour",
        )
        .await;
    world.run(&["relay", "--once"]).await.exits(0);
    assert_eq!(world.number("select count(blocked_position) from event_log").await, 0);
}

/// A function lives for one invocation, so no single function sees the mark blocked for long
/// enough.
#[tokio::test]
async fn a_function_reads_blocked_since_from_the_log() {
    for relay_seconds in ["0", "2"] {
        let world = World::new().await;
        let tally = Tally::new("tally");
        let folder = Folder::new().with("tally.toml", &tally.file(&[]));
        world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
        let mut open = world.connection().await;
        execute(&mut open, "begin").await;
        write(&mut open, "open", 1).await.expect("written");
        world.append(5).await;
        let options =
            ["--projectors", folder.path(), "--metrics=emf", "--relay-seconds", relay_seconds];

        let mut first = world.function(&options).await;
        first.invoke(&schedule(), TIMEOUT).await.expect("an answer");
        let first = first.process.terminate().await.exits(0);
        assert!(
            !first.stderr.contains("high_water_blocked"),
            "too short a time for an alert: {}",
            first.stderr
        );
        assert_eq!(world.number("select blocked_position from event_log").await, 1);
        world
            .execute("update event_log set blocked_since = blocked_since - interval 100 second")
            .await;

        let mut second = world.function(&options).await;
        second.invoke(&schedule(), TIMEOUT).await.expect("an answer");
        let second = second.process.terminate().await.exits(0);
        assert!(second.stderr.contains("\"alert\":\"high_water_blocked\""), "{}", second.stderr);
        let age = second.log().iter().find_map(|line| line["GapAge"].as_f64());
        assert!(age.is_some_and(|age| age >= 100.0), "{age:?}: {}", second.stderr);

        execute(&mut open, "commit").await;
        let mut third = world.function(&options).await;
        third.invoke(&schedule(), TIMEOUT).await.expect("an answer");
        let third = third.process.terminate().await.exits(0);
        assert_eq!(third.log().iter().find_map(|line| line["GapAge"].as_f64()), Some(0.0));
        assert_eq!(world.number("select count(blocked_position) from event_log").await, 0);
    }
}
