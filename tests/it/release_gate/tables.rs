//! The tables of a projector: a projector past its start never continues on a table that was
//! created again, and a new projector is never built on existing rows.

use serde_json::json;

use projectionist::Status;

use super::{Owner, applied, assert_refused, boot_accepting, count_rows, counter};
use crate::support::{Folder, Gate, World, eventually};

/// A log of three events, and the projector `counter` that a boot has built from them.
async fn with_booted_counter() -> (World, Folder) {
    let world = World::new().await;
    world.append(3).await;
    let folder = Folder::new().with("1.toml", &counter("counter", "['*']"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    (world, folder)
}

#[tokio::test]
async fn a_projector_with_a_dropped_table_is_rebuilt_from_its_start() {
    let (world, folder) = with_booted_counter().await;
    let boot = ["boot", "--json", "--projectors", folder.path()];
    world.execute("drop table counter").await;
    world.append(1).await;
    world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(1);
    assert_eq!(world.status("counter").await, "broken");

    for _ in 0..2 {
        let failed = world.run(&boot).await.exits(1);
        failed.clone().prints(&[
            "counter@1",
            "table counter",
            "rebuil",
            "projectionist retire counter@1 --force",
        ]);
        let projector = &failed.json()["projectors"][0];
        assert_eq!((&projector["status"], &projector["position"]), (&json!("broken"), &json!(3)));
        let reason = projector["failure"]["error"].as_str().expect("a text");
        assert!(reason.contains("rebuild") && reason.contains("table counter"), "{reason}");
    }
    world
        .run(&["retire", "counter", "--yes", "--force", "--projectors", folder.path()])
        .await
        .exits(0);
    world.run(&boot).await.exits(0);
    assert_eq!(
        (world.status("counter").await, count_rows(&world, "counter").await),
        ("live".into(), 4)
    );
}

#[tokio::test]
async fn a_live_projector_with_a_dropped_table_is_broken_by_boot() {
    let (world, folder) = with_booted_counter().await;
    let boot = ["boot", "--json", "--projectors", folder.path()];
    world.execute("drop table counter").await;
    folder.write("2.toml", &counter("fresh", "['*']"));
    let failed = world.run(&boot).await.exits(1).prints(&["counter@1", "table counter", "rebuil"]);
    assert!(
        failed
            .log()
            .iter()
            .any(|line| line["alert"] == "projector_broken" && line["projector"] == "counter@1")
    );
    assert_eq!(
        (world.status("counter").await, world.status("fresh").await),
        ("broken".into(), "new".into())
    );
    let fresh = &failed.json()["projectors"][1];
    assert_eq!((&fresh["status"], fresh["reason"].is_string()), (&json!("new"), true));
}

/// Older releases stored no tables in the ledger. Then only setup reveals the loss, because it
/// creates the missing table.
#[tokio::test]
async fn a_setup_that_creates_a_table_after_the_start_breaks_its_projector() {
    let (world, folder) = with_booted_counter().await;
    let boot = ["boot", "--projectors", folder.path()];
    world
        .execute(
            "update projectors set owned_tables = null, start_position = null, status = 'stalled'",
        )
        .await;
    world.execute("drop table counter").await;
    world.run(&boot).await.exits(1).prints(&["counter@1", "table counter", "rebuil"]);
    // The table lacks its past, whether or not it exists again.
    world.execute("create table if not exists counter (n bigint not null)").await;
    world.run(&boot).await.exits(1).prints(&["counter@1", "table counter", "rebuil"]);
    assert_eq!(
        (world.status("counter").await, count_rows(&world, "counter").await),
        ("broken".into(), 0)
    );
}

#[tokio::test]
async fn a_restored_read_model_continues_once_it_is_accepted_by_name() {
    let (world, folder) = with_booted_counter().await;
    let boot = ["boot", "--projectors", folder.path()];
    world.execute("rename table counter to lost").await;
    world.run(&boot).await.exits(1);
    world.execute("rename table lost to counter").await;
    world.append(2).await;
    world.run(&boot).await.exits(1).prints(&["--accept counter@1"]);
    world.run(&[&boot[..], &["--accept", "counter"]].concat()).await.exits(0);
    assert_eq!(
        (world.status("counter").await, count_rows(&world, "counter").await),
        ("live".into(), 5)
    );
    assert_eq!(
        world.number("select count(*) from projectors where rebuild_reason is null").await,
        1
    );
}

#[tokio::test]
async fn two_concurrent_boots_do_not_mistake_a_new_table_for_an_old_one() {
    let world = World::new().await;
    world.append(3).await;
    let owner = Owner { names_its_table: false, ..Owner::new("owner") };
    world.boot(&owner.clone().registry()).await;
    world.execute("update projectors set owned_tables = null, status = 'stalled'").await;
    world.execute("drop table owner").await;

    let gate = Gate::new();
    let waiting = Owner { after_setup: Some(gate.clone()), ..owner.clone() }.registry();
    let other = owner.registry();
    let first = boot_accepting(&world, &waiting, &[]);
    let second = async {
        gate.arrival().await;
        let booting = async {
            let sql = "select count(*) from information_schema.processlist \
                       where db = database() and info like '%get_lock%' \
                       and id <> connection_id()";
            eventually("the other boot waits", async || world.number(sql).await > 0).await;
            gate.open();
        };
        tokio::join!(boot_accepting(&world, &other, &[]), booting).0
    };
    let (first, second) = tokio::join!(first, second);
    for report in [first, second] {
        assert_refused(&report, &["owner@1", "table owner", "rebuil"]);
    }
    let entry = world.entry("owner").await.expect("a row");
    assert!(
        matches!(entry.status, Status::Broken(_)) && entry.rebuild_reason.is_some(),
        "{entry:?}"
    );
}

#[tokio::test]
async fn a_new_projector_on_a_table_with_rows_needs_acceptance() {
    let world = World::new().await;
    world.append(10).await;
    let owner = Owner::new("owner").registry();
    world.boot(&owner).await;
    world.run(&["retire", "owner", "--yes"]).await.exits(0);

    for _ in 0..2 {
        let report = boot_accepting(&world, &owner, &[]).await;
        assert_refused(&report, &["owner@1", "table owner", "has rows", "--accept owner@1"]);
        assert_eq!(
            (report.projectors[0].status(), world.status("owner").await),
            ("new", "new".into())
        );
    }
    assert_eq!(applied(&world, "owner").await.len(), 10, "nothing was added");
    assert!(boot_accepting(&world, &owner, &["owner"]).await.is_released());
    assert_eq!(applied(&world, "owner").await.len(), 20, "the events are added, as accepted");
}

#[tokio::test]
async fn a_new_projector_is_built_on_an_empty_table() {
    let world = World::new().await;
    world.append(10).await;
    let owner = Owner::new("owner").registry();
    world.boot(&owner).await;
    world.run(&["retire", "owner", "--yes"]).await.exits(0);
    world.execute("delete from owner").await;
    assert!(boot_accepting(&world, &owner, &[]).await.is_released());
    assert_eq!(applied(&world, "owner").await.len(), 10);
}
