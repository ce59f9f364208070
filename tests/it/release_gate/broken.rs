//! A broken projector affects only itself. A fixed projector goes live beside others that are still
//! broken, and neither of them stops new projectors.

use serde_json::{Value, json};

use super::{count_rows, counter};
use crate::support::{Folder, World};

/// A projector file that fails at `position`.
fn failing(name: &str, position: u64) -> String {
    counter(name, "['*']")
        .replace("values (1, 1)", &format!("values (1, nullif(:position, {position}))"))
}

fn statuses(booted: &Value) -> Vec<&str> {
    let all = booted["projectors"].as_array().expect("a list").iter();
    all.map(|projector| projector["status"].as_str().expect("a word")).collect()
}

/// A world with two projectors that broke in play, at position 6.
async fn two_broken() -> (World, Folder) {
    let world = World::new().await;
    world.append(5).await;
    let folder =
        Folder::new().with("1.toml", &failing("one", 6)).with("2.toml", &failing("two", 6));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.append(5).await;
    world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(1);
    for name in ["one", "two"] {
        assert_eq!((world.status(name).await, world.position(name).await), ("broken".into(), 5));
    }
    (world, folder)
}

#[tokio::test]
async fn a_fixed_projector_goes_live_while_another_is_broken_and_a_new_one_too() {
    let (world, folder) = two_broken().await;
    folder.write("1.toml", &counter("one", "['*']"));
    folder.write("3.toml", &counter("fresh", "['*']"));
    let failed = world.run(&["boot", "--json", "--projectors", folder.path()]).await.exits(1);
    failed.clone().prints(&["broken: two@1"]);
    assert_eq!(statuses(&failed.json()), ["live", "broken", "live"]);
    assert_eq!(failed.json()["projectors"][0]["failure"], json!(null));
    assert_eq!(count_rows(&world, "fresh").await, 10);
    assert_eq!(
        world.number("select count(*) from projectors where failed_error is not null").await,
        1
    );
}

#[tokio::test]
async fn a_failing_new_projector_stalls_only_other_new_projectors() {
    let (world, folder) = two_broken().await;
    folder.write("1.toml", &counter("one", "['*']"));
    folder.write("0.toml", &failing("poisoned", 2));
    folder.write("3.toml", &counter("fresh", "['*']"));
    let boot = ["boot", "--batch=1", "--json", "--projectors", folder.path()];
    let failed = world.run(&boot).await.exits(1);
    let booted = failed.json();
    assert_eq!(statuses(&booted), ["broken", "live", "broken", "stalled"], "{booted}");
    assert_eq!(world.position("one").await, 10);

    folder.write(
        "0.toml",
        "name = 'poisoned'\nversion = 1\nmode = 'from_beginning'\nsetup = ['create table']\n\
         [[on]]\nevents = ['*']\nsql = 'select 1 from dual'\n",
    );
    // A failing setup also breaks its projector. This one was broken before, so it stops no other
    // projector now.
    let booted = world.run(&boot).await.exits(1).json();
    assert_eq!(statuses(&booted), ["broken", "live", "broken", "live"], "{booted}");
}

#[tokio::test]
async fn boot_with_names_boots_only_these_and_its_exit_code_covers_only_these() {
    let (world, folder) = two_broken().await;
    folder.write("1.toml", &counter("one", "['*']"));
    folder.write("3.toml", &counter("fresh", "['*']"));
    let booted =
        world.run(&["boot", "one", "--json", "--projectors", folder.path()]).await.exits(0).json();
    assert_eq!((&booted["released"], statuses(&booted)), (&json!(true), vec!["live"]));
    assert_eq!(
        (world.status("two").await, world.status("fresh").await),
        ("broken".into(), "new".into())
    );
    world
        .run(&["boot", "one", "two@1", "--projectors", folder.path()])
        .await
        .exits(1)
        .prints(&["broken: two@1"]);
    world.run(&["boot", "fresh@1", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(count_rows(&world, "fresh").await, 10);

    for (name, words) in [
        ("nobody", "no projector \"nobody\""),
        ("one@2", "no projector \"one@2\""),
        ("one@x", "a number"),
    ] {
        world.run(&["boot", name, "--projectors", folder.path()]).await.exits(2).prints(&[words]);
    }
    let unknown = world.run(&["boot", "nobody", "--projectors", folder.path()]).await.exits(2);
    unknown.prints(&["one@1, two@1, fresh@1"]);
    world
        .run(&["boot", "--accept=nobody", "--projectors", folder.path()])
        .await
        .exits(2)
        .prints(&["nobody"]);
}
