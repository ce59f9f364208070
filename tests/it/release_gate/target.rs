//! The target of boot: the end of the log that was visible when boot began.

use serde_json::{Value, json};

use projectionist::sqlx::{AssertSqlSafe, MySqlConnection, query};

use super::{count_rows, counter};
use crate::support::{Folder, World, execute, write};

/// A transaction that holds the next position, with two visible events above it.
async fn block_mark(world: &World) -> MySqlConnection {
    let mut writer = world.connection().await;
    execute(&mut writer, "start transaction").await;
    write(&mut writer, "slow", 1).await.expect("written");
    world.append(2).await;
    writer
}

fn outcome(booted: &Value, index: usize) -> Value {
    let projector = &booted["projectors"][index];
    json!([projector["name"], projector["status"], projector["position"]])
}

#[tokio::test]
async fn boot_does_not_release_while_an_open_transaction_blocks_the_mark() {
    let world = World::new().await;
    world.append(5).await;
    let mut writer = block_mark(&world).await;
    let folder = Folder::new()
        .with("1.toml", &counter("a", "['*']"))
        .with("2.toml", &counter("one_time", "['*']").replace("from_beginning", "once"));
    let boot = ["boot", "--json", "--wait-timeout=1", "--projectors", folder.path()];
    let failed = world.run(&boot).await.exits(1);
    failed.clone().prints(&[
        "the log continues to 8",
        "blocked at 5",
        "holds position 6",
        "innodb_trx",
        "grant process on *.* to 'root'@'",
    ]);
    let booted = failed.json();
    assert_eq!((&booted["released"], &booted["target"]), (&json!(false), &json!(8)));
    assert!(
        booted["reason"].as_str().is_some_and(|reason| reason.contains("holds position 6")),
        "{booted}"
    );
    assert_eq!(outcome(&booted, 0), json!(["a", "booting", 5]));
    assert_eq!(
        outcome(&booted, 1),
        json!(["one_time", "booting", 5]),
        "it is not finished before the end"
    );
    assert!(
        failed
            .log()
            .iter()
            .any(|line| line["message"].as_str().is_some_and(|line| line.starts_with("waiting: ")))
    );

    execute(&mut writer, "commit").await;
    let booted = world.run(&boot).await.exits(0).json();
    assert_eq!(outcome(&booted, 0), json!(["a", "live", 8]));
    assert_eq!(outcome(&booted, 1), json!(["one_time", "finished", 8]));
    assert_eq!((count_rows(&world, "a").await, count_rows(&world, "one_time").await), (8, 8));
}

#[tokio::test]
async fn boot_waits_for_a_transaction_that_ends_within_the_wait_timeout() {
    let world = World::new().await;
    world.append(5).await;
    let mut writer = block_mark(&world).await;
    let folder = Folder::new().with("1.toml", &counter("a", "['*']"));
    let booting = world.start(&["boot", "--wait-timeout=60", "--projectors", folder.path()]);
    booting.wait_for_log("waiting: the log continues to 8").await;
    assert_eq!(world.status("a").await, "booting");
    execute(&mut writer, "commit").await;
    booting.finish().await.exits(0);
    assert_eq!((world.status("a").await, count_rows(&world, "a").await), ("live".into(), 8));
}

#[tokio::test]
async fn a_gap_too_wide_to_fill_fails_boot_with_the_command_that_fills_it() {
    let world = World::new().await;
    let mut writer = world.connection().await;
    let insert = "insert into events (position, stream_id, stream_version, event_type, payload) \
                  values (100001, 's', 1, 'Opened', '{}')";
    execute(&mut writer, insert).await;
    let folder = Folder::new().with("1.toml", &counter("a", "['*']"));
    let boot = ["boot", "--json", "--wait-timeout=0", "--projectors", folder.path()];
    let failed = world.run(&boot).await.exits(1).prints(&["projectionist fill 1 100000"]);
    assert_eq!(outcome(&failed.json(), 0), json!(["a", "booting", 0]));
    let status = world.run(&["status", "--json"]).await.exits(0).json();
    assert_eq!((&status["high_water"], &status["visible"]), (&json!(0), &json!(100_001)));
    assert_eq!(status["projectors"][0]["lag_events"], 100_001, "lag counts to the end of the log");

    world.run(&["fill", "1", "100000", "--yes"]).await.exits(0);
    let booted = world.run(&boot).await.exits(0).json();
    assert_eq!(outcome(&booted, 0), json!(["a", "live", 100_001]));
    assert_eq!(count_rows(&world, "a").await, 1);
}

#[tokio::test]
async fn a_from_now_projector_is_registered_only_when_the_mark_is_at_the_log_end() {
    let world = World::new().await;
    world.append(5).await;
    let mut writer = block_mark(&world).await;
    let folder = Folder::new()
        .with("1.toml", &counter("recent", "['*']").replace("from_beginning", "from_now"));
    let boot = ["boot", "--json", "--wait-timeout=0", "--projectors", folder.path()];
    let failed = world.run(&boot).await.exits(1).prints(&["holds position 6"]);
    assert_eq!(outcome(&failed.json(), 0), json!(["recent", "new", 0]));
    assert_eq!(world.status("recent").await, "new");

    execute(&mut writer, "commit").await;
    world.run(&boot).await.exits(0);
    world.append(1).await;
    world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(
        (world.position("recent").await, count_rows(&world, "recent").await),
        (9, 1),
        "older events are not applied"
    );
}

#[tokio::test]
async fn a_log_that_ends_below_its_mark_stops_every_boot() {
    let world = World::new().await;
    world.append(5).await;
    let folder = Folder::new().with("1.toml", &counter("a", "['*']"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.execute("truncate table events").await;
    let failed = world.run(&["boot", "--json", "--projectors", folder.path()]).await.exits(1);
    failed.clone().prints(&["the log ends at 0, below the high-water mark 5", "truncated"]);
    assert_eq!(failed.json()["released"], false);
    let table = world.run(&["status"]).await.exits(0).stdout;
    assert!(table.contains("the log ends at 0, below the high-water mark 5"), "{table}");
}

#[tokio::test]
async fn lag_counts_to_the_visible_end_and_a_momentary_gap_is_not_blocked() {
    let world = World::new().await;
    world.append(5).await;
    let folder = Folder::new().with("1.toml", &counter("a", "['*']"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let _writer = block_mark(&world).await;
    world
        .execute(
            "update events set recorded_at = utc_timestamp(6) - interval 60 second \
             where position = 7",
        )
        .await;
    let status = world.run(&["status", "--json"]).await.exits(0).json();
    let lag = &status["projectors"][0];
    assert_eq!(
        (&status["high_water"], &status["visible"], &lag["lag_events"]),
        (&json!(5), &json!(8), &json!(3)),
        "{status}"
    );
    let seconds = lag["lag_seconds"].as_f64().expect("a number");
    assert!((59.0..120.0).contains(&seconds), "the age of the oldest visible event: {seconds}");
    assert_eq!(status["held"], json!(null), "the gap has not been stored as a block");
    assert!(!world.run(&["status"]).await.exits(0).stdout.contains("blocked"));

    // The columns as a relay stores them.
    for (last, words) in
        [("null", "a transaction is open at 6"), ("70006", "projectionist fill 6 70006")]
    {
        let sql = format!(
            "update event_log set blocked_position = 6, blocked_last = {last}, \
             blocked_since = utc_timestamp(6) - interval 10 second"
        );
        query(AssertSqlSafe(sql)).execute(&mut world.connection().await).await.expect("updated");
        let status = world.run(&["status", "--json"]).await.exits(0).json();
        let expected_last = last.parse::<u64>().ok();
        assert_eq!(
            (&status["held"]["position"], &status["held"]["last"]),
            (&json!(6), &json!(expected_last))
        );
        assert!(status["held"]["since"].is_string(), "{status}");
        let table = world.run(&["status"]).await.exits(0).stdout;
        assert!(
            table.contains("the mark has been blocked since") && table.contains(words),
            "{table}"
        );
    }
}
