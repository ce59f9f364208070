//! The audit: it passes on an intact log while everything runs, and it reports each fault.

use projectionist::Registry;
use serde_json::json;

use crate::support::{Tally, World, execute};

/// A world with `events` events, all below the high-water mark.
async fn world_with_mark_at(events: usize) -> World {
    let world = World::new().await;
    world.append(events).await;
    world.run(&["relay", "--once"]).await.exits(0);
    world
}

#[tokio::test]
async fn an_intact_log_passes_with_gap_fillers_and_while_it_grows() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = Registry::new().with(tally.clone()).expect("the name is unique");
    world.append(50).await;
    // A rollback leaves a gap, and raising the mark puts a filler into it.
    world
        .execute(
            "begin; insert into events (stream_id, stream_version, event_type, payload) \
             values ('x', 1, 'X', '1'); rollback",
        )
        .await;
    world.append(50).await;
    world.boot(&registry).await;
    let writing = async {
        for _ in 0..10 {
            world.append(20).await;
        }
    };
    let auditing = async {
        for _ in 0..5 {
            world.run(&["audit"]).await.exits(0);
        }
    };
    tokio::join!(writing, auditing, world.play_until_idle(&registry));
    let report = world.run(&["audit", "--json"]).await.exits(0).json();
    assert_eq!(
        (report["ok"].as_bool(), report["rows"].as_u64()),
        (Some(true), Some(301)),
        "{report}"
    );
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_deleted_row_is_named() {
    let world = world_with_mark_at(30).await;
    world.execute("delete from events where position in (7, 30)").await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert_eq!(
        audit.stdout,
        "position 7 has no row: it was deleted\nposition 30 has no row: it was deleted\n"
    );
    assert!(audit.stderr.contains("\"alert\":\"log_fault\""), "{}", audit.stderr);
}

#[tokio::test]
async fn a_replaced_row_is_found() {
    let world = world_with_mark_at(30).await;
    world.execute("update events set event_id = 'another' where position = 7").await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert!(audit.stdout.contains("not those that the high-water mark passed"), "{}", audit.stdout);
}

#[tokio::test]
async fn a_projector_beyond_the_mark_is_named() {
    let world = world_with_mark_at(30).await;
    world.boot(&Registry::new().with(Tally::new("tally")).expect("the name is unique")).await;
    world.execute("update projectors set position = 31").await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert_eq!(audit.stdout, "projector tally@1 is at 31, beyond the high-water mark 30\n");
}

#[tokio::test]
async fn deleted_rows_are_reported_as_ranges_with_their_count_and_one_alert() {
    let world = world_with_mark_at(3_000).await;
    world
        .execute(
            "delete from events where position between 12 and 2522 or position in (2530, 2600)",
        )
        .await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert_eq!(
        audit.stdout,
        "positions 12 to 2522 have no row: 2,511 deleted\nposition 2530 has no row: it was \
         deleted\n\
         position 2600 has no row: it was deleted\n"
    );
    let log = audit.log();
    let alerts: Vec<_> = log.iter().filter(|line| line["alert"] == "log_fault").collect();
    assert_eq!(alerts.len(), 1, "{log:?}");
    assert_eq!(
        ["first", "last", "missing"].map(|key| alerts[0][key].as_u64()),
        [Some(12), Some(2_522), Some(2_513)]
    );
    let report = world.run(&["audit", "--json"]).await.exits(1).json();
    assert_eq!(
        (&report["missing_ranges"], &report["missing_count"]),
        (&json!([[12, 2522], [2530, 2530], [2600, 2600]]), &json!(2_513))
    );
}

#[tokio::test]
async fn the_first_missing_ranges_are_named_and_all_are_counted() {
    let world = world_with_mark_at(600).await;
    world.execute("delete from events where position % 2 = 0").await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert_eq!(audit.stdout.lines().count(), 21);
    assert!(
        audit.stdout.ends_with("also 280 ranges without rows; in all 300 positions deleted\n"),
        "{}",
        audit.stdout
    );
    let report = world.run(&["audit", "--json"]).await.exits(1).json();
    assert_eq!(
        (report["missing_ranges"].as_array().map(Vec::len), &report["missing_count"]),
        (Some(100), &json!(300))
    );
}

#[tokio::test]
async fn rows_at_invalid_positions_are_named_and_break_no_projector() {
    let world = world_with_mark_at(30).await;
    let mut odd = world.connection().await;
    execute(&mut odd, "set session sql_mode = concat(@@sql_mode, ',NO_AUTO_VALUE_ON_ZERO')").await;
    let insert =
        "insert into events (position, stream_id, stream_version, event_type, payload) values";
    execute(&mut odd, &format!("{insert} (0, 'zero', 1, 'Opened', '1')")).await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert_eq!(audit.stdout, "position 0 is never read: no projector gets this row\n");
    world.run(&["relay", "--once"]).await.exits(0);
    let doctor = world.run(&["doctor", "--for=audit"]).await;
    assert!(doctor.stdout.contains("position 0 is never read"), "{}", doctor.stdout);
    world.execute("delete from events where position = 0").await;

    execute(&mut odd, &format!("{insert} (18446744073709551615, 'last', 1, 'Opened', '1')")).await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert!(
        audit.stdout.starts_with("position 18446744073709551615 ends the log"),
        "{}",
        audit.stdout
    );
    let relayed = world.run(&["relay", "--once"]).await.exits(0);
    assert!(
        relayed.stderr.contains("high_water_blocked") && !relayed.stderr.contains("panic"),
        "{}",
        relayed.stderr
    );
    let status = world.run(&["status"]).await.exits(0);
    assert!(status.stdout.contains("18446744073709551615"), "{}", status.stdout);
    let doctor = world.run(&["doctor", "--for=audit"]).await;
    assert!(doctor.stdout.contains("18446744073709551615 ends the log"), "{}", doctor.stdout);
    let refused = world.run(&["fill", "4000", "18446744073709551614", "--yes"]).await.exits(2);
    refused.prints(&["more than 100,000,000 positions", "delete the row after the gap"]);
    let fill = world
        .run(&["fill", "18446744073709551614", "18446744073709551614", "--yes"])
        .await
        .exits(0);
    assert_eq!(
        fill.stdout,
        "filled 1 position from 18446744073709551614 to 18446744073709551614; 0 had a row already\n"
    );
}
