//! Definitions: boot reports a changed definition and refuses a wider subscription. A worker plays
//! a projector only if it was booted with the definition that the worker has.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use projectionist::{Queue, Registry};

use super::{Owner, applied, assert_refused, boot_accepting, count_rows, counter};
use crate::support::{Folder, World, eventually, execute};

/// The stored digest of the projector `a`.
async fn digest(world: &World) -> Option<String> {
    world.entry("a").await.expect("a row").digest
}

#[tokio::test]
async fn a_wider_subscription_stops_the_deploy_with_the_count_of_skipped_events() {
    let world = World::new().await;
    // The event types are Opened, Amended and Closed in turn.
    world.append(10).await;
    let folder = Folder::new().with("1.toml", &counter("a", "['Opened']"));
    let boot = ["boot", "--json", "--projectors", folder.path()];
    let first = world.run(&boot).await.exits(0).json();
    assert_eq!(first["projectors"][0]["changed"], false);
    let booted_with = digest(&world).await.expect("a digest");

    for (wider, passed) in [("['Opened', 'Amended']", 3), ("['*']", 6)] {
        folder.write("1.toml", &counter("a", wider));
        let failed = world.run(&boot).await.exits(1);
        failed.clone().prints(&[
            "a@1",
            &format!("has passed {passed} events"),
            "new version",
            "--accept a@1",
        ]);
        let projector = &failed.json()["projectors"][0];
        assert_eq!((&projector["changed"], projector["reason"].is_string()), (&json!(true), true));
        assert_eq!(
            digest(&world).await.as_ref(),
            Some(&booted_with),
            "the refused definition is not stored"
        );
    }
    world.run(&[&boot[..], &["--accept=a"]].concat()).await.exits(0);
    assert_ne!(digest(&world).await, Some(booted_with));
    let again = world.run(&boot).await.exits(0).json();
    assert_eq!(again["projectors"][0]["changed"], false, "the accepted definition is stored");
    assert_eq!(count_rows(&world, "a").await, 4);
}

#[tokio::test]
async fn a_subscription_widened_by_event_types_without_events_is_accepted() {
    let world = World::new().await;
    world.append(10).await;
    let folder = Folder::new().with("1.toml", &counter("a", "['Opened']"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    folder.write("1.toml", &counter("a", "['Opened', 'Never seen']"));
    let booted =
        world.run(&["boot", "--json", "--projectors", folder.path()]).await.exits(0).json();
    assert_eq!(booted["projectors"][0]["changed"], true);
}

#[tokio::test]
async fn a_changed_definition_is_reported_by_boot_status_and_doctor() {
    let world = World::new().await;
    world.append(10).await;
    let folder = Folder::new().with("1.toml", &counter("a", "['Opened', 'Amended']"));
    let boot = ["boot", "--projectors", folder.path()];
    world.run(&boot).await.exits(0);
    let status = ["status", "--json", "--projectors", folder.path()];
    let projector =
        async || -> Value { world.run(&status).await.exits(0).json()["projectors"][0].clone() };
    assert_eq!(projector().await["changed"], false);
    assert_eq!(projector().await["digest"], json!(digest(&world).await));
    assert_eq!(
        world.run(&["status", "--json"]).await.exits(0).json()["projectors"][0]["changed"],
        json!(null)
    );

    folder.write("1.toml", &counter("a", "['Opened']"));
    assert_eq!(projector().await["changed"], true);
    let table = world.run(&["status", "--projectors", folder.path()]).await.exits(0).stdout;
    assert!(table.contains("changed since it was booted)"), "{table}");
    let doctor = world.run(&["doctor", "--projectors", folder.path()]).await;
    assert!(doctor.stdout.contains("changed since it was booted"), "{}", doctor.stdout);

    let booted = world.run(&boot).await.exits(0);
    assert!(booted.stdout.contains("changed since it was booted"), "{}", booted.stdout);
    assert!(booted.log().iter().any(|line| line["message"] == "changed since it was booted"));
    assert_eq!(projector().await["changed"], false);
    assert!(!world.run(&boot).await.exits(0).stdout.contains("changed"));
}

#[tokio::test]
async fn a_projector_booted_before_digests_existed_gets_its_digest_silently() {
    let world = World::new().await;
    world.append(3).await;
    let folder = Folder::new().with("1.toml", &counter("a", "['*']"));
    let boot = ["boot", "--json", "--projectors", folder.path()];
    world.run(&boot).await.exits(0);
    let booted_with = digest(&world).await;
    world
        .execute("update projectors set digest = null, event_types = null, owned_tables = null")
        .await;
    assert_eq!(world.run(&boot).await.exits(0).json()["projectors"][0]["changed"], false);
    assert_eq!(digest(&world).await, booted_with);
}

/// Two releases that define the same projector in different ways.
fn releases() -> (Registry, Registry) {
    (Owner::new("owner").registry(), Owner { revision: "2", ..Owner::new("owner") }.registry())
}

#[tokio::test]
async fn a_worker_plays_a_projector_only_with_the_booted_definition() {
    let world = World::new().await;
    let (old, new) = releases();
    world.append(3).await;
    world.boot(&old).await;
    let worker = world.start_play(&old);
    world.append(3).await;
    eventually("the old worker plays", async || world.position("owner").await == 6).await;

    assert!(world.boot(&new).await.is_released());
    world.append(3).await;
    // The old worker keeps checking the ledger, but only the new one moves the projector.
    let idle = world.play_until_idle(&old).await;
    assert_eq!((idle.outdated, idle.broken, world.position("owner").await), (1, 0, 6));
    world.play_until_idle(&new).await;
    assert_eq!(world.position("owner").await, 9);
    let revisions: Vec<String> =
        applied(&world, "owner").await.into_iter().map(|(_, revision)| revision).collect();
    assert_eq!(revisions, ["1", "1", "1", "1", "1", "1", "2", "2", "2"]);

    // The old definition is booted again: the worker that ran all the time continues.
    assert!(world.boot(&old).await.is_released());
    world.append(1).await;
    eventually("the old worker plays again", async || world.position("owner").await == 10).await;
    worker.stop().await;
}

#[tokio::test]
async fn an_outdated_worker_never_breaks_a_projector() {
    let world = World::new().await;
    let old = Owner { fails_at: Some(4), ..Owner::new("owner") }.registry();
    let fixed = Owner { revision: "2", ..Owner::new("owner") }.registry();
    world.append(3).await;
    world.boot(&old).await;
    let worker = world.start_play(&old);
    world.append(1).await;
    eventually("the old definition breaks it", async || world.status("owner").await == "broken")
        .await;
    assert!(world.boot(&fixed).await.is_released());
    world.append(5).await;
    world.play_until_idle(&fixed).await;
    assert_eq!((world.status("owner").await, world.position("owner").await), ("live".into(), 9));
    assert!(worker.is_running());
    assert_eq!(worker.stop().await.broken, 1, "it broke only before the fix");
}

#[tokio::test]
async fn a_worker_in_a_batch_is_fenced_when_another_definition_is_booted() {
    let world = World::new().await;
    let (old, new) = releases();
    world.append(3).await;
    world.boot(&old).await;
    // The worker has read the ledger and the messages. The new release is booted before the worker
    // claims the row.
    let mut lock_holder = world.connection().await;
    execute(&mut lock_holder, "start transaction").await;
    execute(&mut lock_holder, "select * from projectors for update").await;
    let worker = world.start_play(&old);
    world.append(3).await;
    eventually("the worker waits for the row", async || world.lock_waits().await > 0).await;
    let digest = {
        let scratch = World::new().await;
        scratch.boot(&new).await;
        scratch.entry("owner").await.expect("a row").digest.expect("a digest")
    };
    execute(&mut lock_holder, &format!("update projectors set digest = '{digest}'")).await;
    execute(&mut lock_holder, "commit").await;
    let settings = World::continuous_play_settings().with_reconcile_after(Duration::ZERO);
    let fresh = world.start_play_from(Arc::clone(&world.queue) as Arc<dyn Queue>, &new, settings);
    eventually("the new definition plays", async || world.position("owner").await == 6).await;
    let revisions: Vec<String> =
        applied(&world, "owner").await.into_iter().map(|(_, revision)| revision).collect();
    assert_eq!(revisions, ["1", "1", "1", "2", "2", "2"]);
    worker.stop().await;
    fresh.stop().await;
}

#[tokio::test]
async fn until_idle_exits_with_1_if_another_definition_was_booted() {
    let world = World::new().await;
    world.append(10).await;
    let folder = Folder::new().with("1.toml", &counter("a", "['Opened', 'Amended']"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    folder.write("1.toml", &counter("a", "['Opened']"));
    world.append(3).await;
    let played = world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(1);
    played
        .clone()
        .prints(&["1 projector not played, because booted with another definition", "Run boot"]);
    let warnings = played.log().into_iter().filter(|line| {
        line["projector"] == "a@1"
            && line["message"].as_str().is_some_and(|line| line.starts_with("outdated"))
    });
    assert_eq!(warnings.count(), 1, "one warning: {}", played.stderr);
    assert_eq!(world.position("a").await, 10);
}

#[tokio::test]
async fn a_wider_subscription_in_a_rust_projector_is_refused_too() {
    let world = World::new().await;
    world.append(10).await;
    let narrow = Owner { types: vec!["Opened"], ..Owner::new("owner") };
    world.boot(&narrow.registry()).await;
    let report = boot_accepting(&world, &Owner::new("owner").registry(), &[]).await;
    assert_refused(&report, &["owner@1", "has passed 6 events", "new version"]);
}
