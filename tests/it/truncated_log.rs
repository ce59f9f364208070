//! The end of the log must not lie below the mark. A truncated, restored or deleted end raises an
//! alert within seconds, and a loss that an operator accepts is recorded.

use std::time::Duration;

use crate::support::{Folder, RunningProcess, Tally, World, eventually};

/// A world whose mark has passed 30 events, with a projector that is live at the end: its tally,
/// and the folder with its file.
async fn world_with_played_log() -> (World, Tally, Folder) {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let folder = Folder::new().with("tally.toml", &tally.file(&[]));
    world.append(30).await;
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(world.high_water().await, 30);
    (world, tally, folder)
}

fn faults(process: &RunningProcess) -> usize {
    process.logged().matches("\"alert\":\"log_fault\"").count()
}

/// How the end of the log is lost, the fault that this causes, and the last position after an
/// append.
const LOST: [(&str, &str, u64); 2] = [
    // Positions start again at 1, below the mark.
    ("truncate events", "the log ends at 5, below the high-water mark 30", 5),
    ("restore", "the log ends at 25, below the high-water mark 30", 25),
];

async fn lose_the_end(world: &World, how: &str) {
    match how {
        "restore" => {
            world.execute("delete from events where position > 20").await;
            world.execute("alter table events auto_increment = 21").await;
        }
        statement => world.execute(statement).await,
    }
    world.append(5).await;
}

#[tokio::test]
async fn a_log_that_ends_below_the_mark_alerts_once_from_relay_and_reconcile() {
    for (how, words, last) in LOST {
        let (world, _, folder) = world_with_played_log().await;
        lose_the_end(&world, how).await;
        assert_eq!(world.last_position().await, last);
        let relay = world.start(&["relay"]);
        let play =
            world.start(&["play", "--no-relay", "--receive-wait=0", "--projectors", folder.path()]);
        relay.wait_for_log(words).await;
        play.wait_for_log(words).await;
        // After many more checks, there is still one alert.
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!((faults(&relay), faults(&play)), (1, 1), "{}", relay.logged());
        let both = world.start(&["play", "--receive-wait=0", "--projectors", folder.path()]);
        relay.terminate().await.exits(0);
        play.terminate().await.exits(0);
        both.wait_for_log(words).await;
        eventually("its relay runs", async || {
            world.number("select relay_lease_holder is not null from event_log").await == 1
        })
        .await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(
            faults(&both),
            1,
            "the relay and the reconcile of one process report it once: {}",
            both.logged()
        );
        both.terminate().await.exits(0);
    }
}

#[tokio::test]
async fn a_log_that_ends_below_the_mark_fails_until_idle_and_is_in_the_status() {
    for (how, words, _) in LOST {
        let (world, _, folder) = world_with_played_log().await;
        lose_the_end(&world, how).await;
        world
            .run(&["play", "--until-idle", "--projectors", folder.path()])
            .await
            .exits(1)
            .prints(&[words]);
        let status = world.run(&["status", "--json"]).await.exits(0).json();
        assert!(
            status["log_fault"].as_str().is_some_and(|fault| fault.contains(words)),
            "{status}"
        );
        let status = world.run(&["status"]).await.exits(0).stdout;
        assert!(status.contains(&format!("log fault: {words}")), "{status}");
        world.run(&["audit"]).await.exits(1);
    }
}

#[tokio::test]
async fn a_deleted_end_alerts_and_later_appends_are_still_applied() {
    let (world, tally, folder) = world_with_played_log().await;
    world.execute("delete from events where position > 28").await;
    let relay = world.start(&["relay"]);
    relay.wait_for_log("the log ends at 28, below the high-water mark 30").await;
    world.append(5).await;
    eventually("the mark rises", async || world.high_water().await == 35).await;
    // The row of the mark was missing when the mark rose. The process that raised the mark reports
    // this, because the loss is not visible afterwards.
    relay.wait_for_log("the high-water mark 30 has no row").await;
    relay.terminate().await.exits(0);
    world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(world.position(tally.name()).await, 35);
    let audit = world.run(&["audit"]).await.exits(1);
    assert_eq!(audit.stdout, "positions 29 to 30 have no row: 2 deleted\n");
}

/// A log that ends below the mark raises alerts. Once appends have passed the mark, only an audit
/// detects the loss.
#[tokio::test]
async fn the_audit_rejects_a_restored_log_that_grew_past_the_mark() {
    let (world, _, folder) = world_with_played_log().await;
    lose_the_end(&world, "restore").await;
    world.append(20).await;
    assert_eq!(world.last_position().await, 45);
    world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(world.high_water().await, 45);
    let status = world.run(&["status", "--json"]).await.exits(0).json();
    assert!(status["log_fault"].is_null(), "{status}");
    let audit = world.run(&["audit", "--json"]).await.exits(1).json();
    let fault = audit["faults"][0].as_str().expect("a fault");
    assert!(fault.contains("are not those that the high-water mark passed"), "{audit}");
}

#[tokio::test]
async fn accepted_losses_are_recorded_and_processing_continues_without_alerts() {
    for how in [
        "truncate events",
        "restore",
        "delete from events where position between 12 and 19",
        "the end",
    ] {
        let (world, tally, folder) = world_with_played_log().await;
        let (first, last, missing) = match how {
            "truncate events" | "restore" => {
                lose_the_end(&world, how).await;
                if how == "restore" { (26, 30, 5) } else { (6, 30, 25) }
            }
            "the end" => {
                world.execute("delete from events where position > 28").await;
                (29, 30, 2)
            }
            statement => {
                world.execute(statement).await;
                (12, 19, 8)
            }
        };
        let (from, to) = (first.to_string(), last.to_string());
        let accept = ["audit", "--accept", &from, &to, "--reason", "as the ticket says", "--yes"];
        let accepted = world.run(&accept).await.exits(0);
        assert!(
            accepted.stdout.contains("30 rows up to the high-water mark 30: no faults"),
            "{}",
            accepted.stdout
        );
        let line = format!("accepted: positions {first} to {last}, {missing} without a row, by ");
        assert!(accepted.stdout.contains(&line), "{}", accepted.stdout);
        let audit = world.run(&["audit", "--json"]).await.exits(0).json();
        let acceptance = &audit["acceptances"][0];
        assert_eq!(
            ["first", "last", "missing"].map(|key| acceptance[key].as_u64()),
            [Some(first), Some(last), Some(missing)],
            "{audit}"
        );
        assert_eq!(acceptance["reason"], "as the ticket says");
        assert!(
            acceptance["accepted_by"].as_str().is_some_and(|by| by.contains(" as root@")),
            "{audit}"
        );

        // New events get positions above the mark, wherever the positions continued.
        world.append(10).await;
        assert_eq!(world.positions("position > 30").await.len(), 10, "{how}");
        let late = Tally::new("late");
        folder.write("late.toml", &late.file(&[]));
        world.execute("update event_log set published = 0").await;
        let boot = world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
        let play =
            world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
        for logged in [boot.stderr, play.stderr] {
            assert!(!logged.contains("log_fault"), "{how}: {logged}");
        }
        world.assert_complete(&late).await;
        assert_eq!(world.position(tally.name()).await, world.last_position().await);
        world.run(&["audit"]).await.exits(0);
    }
}

#[tokio::test]
async fn an_acceptance_is_refused_if_more_or_nothing_is_missing() {
    let (world, _, _) = world_with_played_log().await;
    let accept = async |first: &str, last: &str| {
        world.run(&["audit", "--accept", first, last, "--reason", "because", "--yes"]).await
    };
    accept("1", "30").await.exits(2).prints(&["there is nothing to accept"]);
    world.execute("delete from events where position in (7, 8, 20)").await;
    let refused = accept("7", "8").await.exits(2);
    refused.prints(&[
        "3 positions",
        "of which 2 between 7 and 8",
        "nothing was accepted",
        "position 20 has no row",
    ]);
    accept("7", "31").await.exits(2).prints(&["not a range up to the high-water mark 30"]);
    accept("8", "7").await.exits(2).prints(&["not a range"]);
    world.run(&["audit", "--accept", "7", "20", "--yes"]).await.exits(2);
    world
        .run(&["audit", "--accept", "7", "20", "--reason", "no terminal"])
        .await
        .exits(2)
        .prints(&["--yes"]);
    world.run(&["audit"]).await.exits(1);
    assert_eq!(world.number("select count(*) from log_acceptances").await, 0);
    assert!(world.fillers().await.is_empty());
    accept("7", "20").await.exits(0);
    assert_eq!(
        (
            world.number("select missing_positions from log_acceptances").await,
            world.fillers().await
        ),
        (3, vec![7, 8, 20])
    );
}

/// No row is missing: only the fingerprint shows that a backup has other rows.
#[tokio::test]
async fn replaced_rows_can_be_accepted() {
    let (world, _, _) = world_with_played_log().await;
    world.execute("update events set event_id = 'another' where position = 7").await;
    world.run(&["audit"]).await.exits(1);
    world.run(&["audit", "--accept", "7", "7", "--reason", "corrected", "--yes"]).await.exits(0);
    world.append(5).await;
    world.run(&["relay", "--once"]).await.exits(0);
    world.run(&["audit"]).await.exits(0);
    world.execute("delete from events where position = 9").await;
    world.run(&["audit"]).await.exits(1);
}
