//! `status`: every projector with its state, at any time, without waiting for locks.

use serde_json::{Value, json};

use super::{
    close_gate, failing_at, gated, tally, tally_with, wait_for_gated_handler, with_short_timeout,
};
use crate::support::{Folder, World, execute};

fn keys(object: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> =
        object.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

fn projector<'a>(status: &'a Value, name: &str) -> &'a Value {
    let mut all = status["projectors"].as_array().expect("the projectors are a list").iter();
    all.find(|projector| projector["name"] == name).unwrap_or_else(|| panic!("{name} in {status}"))
}

/// A world with a projector in every state except booting. The folder contains all of them except
/// `gone` and `elsewhere`.
async fn in_every_state() -> (World, Folder) {
    let world = World::new().await;
    world.append(10).await;
    let side_effects = "mode = 'from_beginning'\nside_effects = true";
    let first = Folder::new()
        .with("1.toml", &tally("living"))
        .with("2.toml", &tally_with("done", "mode = 'once'", ":position"))
        .with("3.toml", &tally_with("gone", side_effects, ":position"))
        .with("4.toml", &tally("elsewhere"));
    world.run(&["boot", "--projectors", first.path()]).await.exits(0);
    world.run(&["retire", "gone", "--yes"]).await.exits(0);
    world.append(5).await;
    // The oldest event that `living` has not applied was recorded a minute ago.
    world
        .execute(
            "update events set recorded_at = utc_timestamp(6) - interval 60 second \
             where position = 11",
        )
        .await;
    let second = Folder::new()
        .with("1.toml", &tally("living"))
        .with("2.toml", &tally_with("done", "mode = 'once'", ":position"))
        .with("3.toml", &failing_at("poisoned", 7))
        .with("4.toml", &tally_with("waiting", "mode = 'from_now'", ":position"));
    world.run(&["boot", "--release=v7", "--projectors", second.path()]).await.exits(1);
    second.write("5.toml", &tally("fresh"));
    second.write("6.toml", &tally_with("fresh_from_now", "mode = 'from_now'", ":position"));
    (world, second)
}

#[tokio::test]
async fn the_json_has_exactly_the_documented_keys_and_values_in_every_state() {
    let (world, folder) = in_every_state().await;
    let status =
        world.run(&["status", "--json", "--projectors", folder.path()]).await.exits(0).json();
    assert_eq!(
        keys(&status),
        [
            "foreign_at",
            "foreign_messages",
            "held",
            "high_water",
            "log_fault",
            "projectors",
            "published",
            "published_by_boot",
            "visible"
        ]
    );
    assert_eq!((&status["foreign_messages"], &status["foreign_at"]), (&json!(0), &json!(null)));
    assert_eq!(
        [&status["high_water"], &status["published"], &status["published_by_boot"]],
        [&json!(15), &json!(10), &json!(10)],
        "the marks are those of the boot"
    );
    let expected = [
        ("living", "from_beginning", "live", 10, 5),
        ("done", "once", "finished", 10, 0),
        ("gone", "from_beginning", "retired", 10, 0),
        ("elsewhere", "from_beginning", "live", 10, 5),
        ("poisoned", "from_beginning", "broken", 6, 9),
        ("waiting", "from_now", "stalled", 15, 0),
        ("fresh", "from_beginning", "new", 0, 15),
        ("fresh_from_now", "from_now", "new", 0, 0),
    ];
    assert_eq!(status["projectors"].as_array().map(Vec::len), Some(expected.len()));
    for (name, mode, state, position, lag) in expected {
        let of = projector(&status, name);
        let expected_keys = [
            "changed",
            "delivery",
            "digest",
            "failure",
            "lag_events",
            "lag_seconds",
            "mode",
            "name",
            "position",
            "rebuild_reason",
            "retrying",
            "since",
            "status",
            "version",
        ];
        assert_eq!(keys(of), expected_keys, "{name}");
        let values =
            json!([of["version"], of["mode"], of["status"], of["position"], of["lag_events"]]);
        assert_eq!(values, json!([1, mode, state, position, lag]), "{name}");
        let seconds = of["lag_seconds"].as_f64().expect("the lag is a number");
        assert_eq!(seconds > 0.0, lag > 0, "{name} lags {seconds} s");
        assert_eq!(of["failure"].is_null(), state != "broken", "{name}");
        assert_eq!(of["since"].is_null(), state == "new", "{name}");
        assert!(of["retrying"].is_null(), "{name}");
    }
    let seconds =
        projector(&status, "living")["lag_seconds"].as_f64().expect("the lag is a number");
    assert!(
        (59.0..120.0).contains(&seconds),
        "the lag must be the age of the next event: {seconds}"
    );

    let failure = &projector(&status, "poisoned")["failure"];
    assert_eq!(
        keys(failure),
        ["at", "attempts", "error", "event_id", "event_type", "host", "position", "release"]
    );
    assert_eq!((&failure["position"], &failure["event_type"]), (&json!(7), &json!("Opened")));
    assert_eq!((&failure["attempts"], &failure["release"]), (&json!(2), &json!("v7")));
    let id = format!(
        "select count(*) from events where position = 7 and event_id = {}",
        failure["event_id"]
    );
    assert_eq!(world.number(&id).await, 1, "{failure}");
    assert!(failure["host"].as_str().is_some_and(|host| !host.is_empty()), "{failure}");
    let error = failure["error"].as_str().expect("the error is text");
    assert!(
        error.contains(&format!("{}:7", folder.file("3.toml"))) && error.contains("cannot be null"),
        "{error}"
    );
    let at = failure["at"].as_str().expect("the time is text");
    let at = time::OffsetDateTime::parse(at, &time::format_description::well_known::Rfc3339)
        .expect("the time is valid");
    assert!((time::OffsetDateTime::now_utc() - at).whole_seconds().abs() < 60);
}

#[tokio::test]
async fn the_table_shows_the_same_values_as_the_json() {
    let (world, folder) = in_every_state().await;
    let json =
        world.run(&["status", "--json", "--projectors", folder.path()]).await.exits(0).json();
    let table = world.run(&["status", "--projectors", folder.path()]).await.exits(0).stdout;
    assert!(table.contains("high-water mark 15") && table.contains("published 10"), "{table}");
    for projector in json["projectors"].as_array().expect("the projectors are a list") {
        let text = |key: &str| {
            projector[key].as_str().map_or_else(|| projector[key].to_string(), str::to_owned)
        };
        let expected = ["status", "position", "lag_events"].map(text);
        let id = format!("{}@{}", text("name"), text("version"));
        let row = table
            .lines()
            .find(|line| line.contains(&format!("  {id}")))
            .expect("the projector has a row");
        assert_eq!(row.split_whitespace().take(3).collect::<Vec<_>>(), expected, "{table}");
        let is_known = !["gone@1", "elsewhere@1"].contains(&&*id);
        assert_eq!(row.contains("not in this set"), !is_known, "{table}");
        assert_eq!(row.contains(&text("mode")), text("mode") != "from_beginning", "{table}");
        if let Some(error) = projector["failure"]["error"].as_str() {
            assert!(table.contains(error) && table.contains("failed at 7, Opened"), "{table}");
        }
    }
    assert_eq!(
        table.lines().next(),
        Some("8 projectors: 1 broken, 1 stalled, 2 new, 2 live, 1 finished, 1 retired")
    );
    let position = |status: &str| {
        table.lines().position(|line| line.starts_with(status)).expect("the status has a row")
    };
    assert!(position("broken") < position("stalled") && position("stalled") < position("live"));
    // Without `--projectors`, no projector is reported as not in the set.
    let without_set = world.run(&["status"]).await.exits(0).stdout;
    assert!(
        without_set.contains("poisoned")
            && !without_set.contains("fresh")
            && !without_set.contains("not in this set")
    );
}

#[tokio::test]
async fn status_works_with_an_empty_ledger() {
    let world = World::new().await;
    let json = world.run(&["status", "--json"]).await.exits(0).json();
    let expected = json!({
        "high_water": 0, "visible": 0, "held": null, "published": 0, "published_by_boot": 0,
        "log_fault": null, "foreign_messages": 0, "foreign_at": null, "projectors": []
    });
    assert_eq!(json, expected);
    let table = world.run(&["status"]).await.exits(0).stdout;
    assert!(table.contains("no projector has been booted yet"), "{table}");
}

#[tokio::test]
async fn status_waits_neither_for_a_running_boot_nor_for_a_locked_ledger() {
    let world = World::new().await;
    world.append(10).await;
    let folder = Folder::new().with("1.toml", &gated("slow"));
    let mut gate = close_gate(&world).await;
    let boot = world.start(&["boot", "--projectors", folder.path()]);
    wait_for_gated_handler(&world).await;
    let mut status = json!(null);
    with_short_timeout(async { status = world.run(&["status", "--json"]).await.exits(0).json() })
        .await;
    assert_eq!(projector(&status, "slow")["status"], "booting");
    assert_eq!(projector(&status, "slow")["lag_events"], 10);
    execute(&mut gate, "rollback").await;
    boot.finish().await.exits(0);

    execute(&mut gate, "start transaction").await;
    execute(&mut gate, "select * from projectors for update").await;
    execute(&mut gate, "select * from event_log for update").await;
    with_short_timeout(async { status = world.run(&["status", "--json"]).await.exits(0).json() })
        .await;
    assert_eq!(projector(&status, "slow")["status"], "live");
    with_short_timeout(world.run(&["status", "--projectors", folder.path()])).await.exits(0);
}

#[tokio::test]
async fn status_with_a_name_shows_that_projector_and_a_misspelt_name_gets_a_suggestion() {
    let (world, folder) = in_every_state().await;
    let json = world.run(&["status", "poisoned", "done@1", "--json"]).await.exits(0).json();
    let names: Vec<&Value> =
        json["projectors"].as_array().expect("a list").iter().map(|of| &of["name"]).collect();
    assert_eq!(names, ["done", "poisoned"]);
    let one = world.run(&["status", "living", "--projectors", folder.path()]).await.exits(0).stdout;
    assert!(one.contains("live since 2") && !one.contains("poisoned"), "{one}");
    let unknown = world.run(&["status", "poisned"]).await.exits(2);
    unknown.prints(&["no projector \"poisned\"", "did you mean poisoned@1?"]);
}

/// The status is that of the first failure, and the failure is the last one.
#[tokio::test]
async fn a_projector_that_breaks_again_is_broken_since_it_broke_first() {
    let world = World::new().await;
    world.append(3).await;
    let folder = Folder::new().with("1.toml", &failing_at("poisoned", 2));
    let boot = ["boot", "--projectors", folder.path()];
    let mut seen = Vec::new();
    for _ in 0..2 {
        world.run(&boot).await.exits(1);
        let status = world.run(&["status", "--json"]).await.exits(0).json();
        let of = projector(&status, "poisoned");
        seen.push((of["since"].clone(), of["failure"]["at"].clone()));
    }
    assert_eq!(seen[0].0, seen[1].0);
    assert_ne!(seen[0].1, seen[1].1);
}

#[tokio::test]
async fn a_published_position_that_boot_moved_is_not_shown_as_sent() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    let marks = async || {
        let shown = world.run(&["status"]).await.exits(0).stdout;
        shown.lines().nth(1).expect("the marks").to_owned()
    };
    world.append(20).await;
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    assert!(marks().await.ends_with("published 20 (by boot, nothing sent)"), "{}", marks().await);
    world.append(5).await;
    world.run(&["relay", "--once"]).await.exits(0);
    assert!(marks().await.ends_with("published 25"), "{}", marks().await);
}
