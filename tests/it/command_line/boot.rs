//! `boot`: the deploy gate.

use serde_json::{Value, json};

use super::{assert_failed_at, failing_at, tally, tally_positions, tally_with};
use crate::support::{Folder, World, eventually};

fn outcome(booted: &Value, index: usize) -> Value {
    let of = &booted["projectors"][index];
    json!([
        of["name"],
        of["version"],
        of["mode"],
        of["status"],
        of["from_position"],
        of["position"],
        of["failure"].is_null()
    ])
}

#[tokio::test]
async fn boot_prints_the_outcome_of_each_projector() {
    let world = World::new().await;
    world.append(10).await;
    let folder = Folder::new()
        .with("1.toml", &tally("every"))
        .with("2.toml", &tally_with("since_now", "mode = 'from_now'", ":position"))
        .with("3.toml", &tally_with("one_time", "mode = 'once'", ":position"));
    let booted =
        world.run(&["boot", "--json", "--projectors", folder.path()]).await.exits(0).json();
    assert_eq!(booted["released"], true);
    assert_eq!(outcome(&booted, 0), json!(["every", 1, "from_beginning", "live", null, 10, true]));
    assert_eq!(outcome(&booted, 1), json!(["since_now", 1, "from_now", "live", null, 10, true]));
    assert_eq!(outcome(&booted, 2), json!(["one_time", 1, "once", "finished", null, 10, true]));

    world.append(5).await;
    let again = world.run(&["boot", "--json", "--projectors", folder.path()]).await.exits(0).json();
    assert_eq!(
        outcome(&again, 0),
        json!(["every", 1, "from_beginning", "live", 10, 10, true]),
        "the second boot has nothing to do"
    );
    assert_eq!(
        (
            tally_positions(&world, "every").await.len(),
            tally_positions(&world, "since_now").await.len()
        ),
        (10, 0)
    );

    let for_people = world.run(&["boot", "--projectors", folder.path()]).await.exits(0).stdout;
    let expected = "\
3 projectors: 2 live, 1 finished

STATUS    POSITION  PROJECTOR
live            10  every@1  (nothing to boot)
live            10  since_now@1  (nothing to boot)
finished        10  one_time@1  (nothing to boot)
";
    assert_eq!(for_people, expected);
}

#[tokio::test]
async fn a_failing_handler_breaks_its_projector_stalls_the_others_and_ends_boot_with_1() {
    let world = World::new().await;
    world.append(50).await;
    let folder = Folder::new()
        .with("1.toml", &tally("first"))
        .with("2.toml", &failing_at("poisoned", 23))
        .with("3.toml", &tally("last"));
    let boot = ["boot", "--batch=10", "--json", "--projectors", folder.path()];
    let failed = world
        .run(&boot)
        .await
        .exits(1)
        .prints(&["broken: poisoned@1", "fix it and run boot again"]);
    let booted = failed.json();
    assert_eq!(booted["released"], false);
    assert_eq!(
        outcome(&booted, 1),
        json!(["poisoned", 1, "from_beginning", "broken", null, 22, false])
    );
    let failure = &booted["projectors"][1]["failure"];
    assert_eq!((&failure["position"], &failure["event_type"]), (&json!(23), &json!("Amended")));
    assert!(failure["error"].as_str().is_some_and(|error| error.contains("2.toml:7")), "{failure}");
    assert_failed_at(&world, "poisoned", 23).await;
    let mut stalled_at = Vec::new();
    for (index, name) in [(0, "first"), (2, "last")] {
        let of = &booted["projectors"][index];
        assert_eq!(
            (&of["name"], &of["status"], &of["failure"]),
            (&json!(name), &json!("stalled"), &json!(null))
        );
        let position = of["position"].as_u64().expect("the position is a number");
        assert!(position < 50, "boot must stop at the first failure");
        assert_eq!(tally_positions(&world, name).await, (1..=position).collect::<Vec<_>>());
        stalled_at.push(position);
    }
    assert!(
        failed
            .log()
            .iter()
            .any(|line| line["alert"] == "boot_failed" && line["broken"] == "poisoned@1")
    );
    assert!(
        failed
            .log()
            .iter()
            .any(|line| line["alert"] == "projector_broken" && line["position"] == 23)
    );

    // The file is repaired.
    folder.write("2.toml", &tally("poisoned"));
    let booted = world.run(&boot).await.exits(0).json();
    assert_eq!(booted["released"], true);
    assert_eq!(
        outcome(&booted, 0),
        json!(["first", 1, "from_beginning", "live", stalled_at[0], 50, true])
    );
    assert_eq!(outcome(&booted, 1), json!(["poisoned", 1, "from_beginning", "live", 22, 50, true]));
    assert_eq!(
        outcome(&booted, 2),
        json!(["last", 1, "from_beginning", "live", stalled_at[1], 50, true])
    );
    for name in ["first", "poisoned", "last"] {
        assert_eq!(
            tally_positions(&world, name).await,
            (1..=50).collect::<Vec<_>>(),
            "each event once, in order"
        );
    }
}

#[tokio::test]
async fn a_failing_handler_is_printed_with_event_and_error() {
    let world = World::new().await;
    world.append(9).await;
    let folder = Folder::new().with("1.toml", &failing_at("poisoned", 6));
    for _ in 0..2 {
        let failed = world.run(&["boot", "--projectors", folder.path()]).await.exits(1);
        for words in [
            "1 projector: 1 broken",
            "broken         5  poisoned@1",
            "failed at 6, Closed, event ",
            "2 attempts, ",
            "1.toml:7",
            "cannot be null",
        ] {
            assert!(failed.stdout.contains(words), "{words} in {}", failed.stdout);
        }
    }
}

#[tokio::test]
async fn a_projector_with_a_changed_mode_is_refused_with_advice() {
    let world = World::new().await;
    world.append(3).await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    folder.write("1.toml", &tally_with("a", "mode = 'once'", ":position"));
    let refused = world.run(&["boot", "--projectors", folder.path()]).await.exits(2);
    refused.prints(&["a@1", "from_beginning", "once", "give it a new version"]);
}

#[tokio::test]
async fn boot_needs_only_the_database() {
    let world = World::new().await;
    world.append(3).await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    let mut command = world.command(&["boot", "--projectors", folder.path()]);
    for variable in [
        "QUEUE_URL",
        "AWS_ENDPOINT_URL",
        "AWS_REGION",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    ] {
        command.env_remove(variable);
    }
    crate::support::RunningProcess::spawn(command).finish().await.exits(0);
    assert_eq!(world.status("a").await, "live");
}

#[tokio::test]
async fn a_boot_stopped_by_a_signal_says_so_and_later_resumes() {
    let world = World::new().await;
    world.append(200).await;
    // 20 ms for each event, so that the test can act in the middle.
    let folder = Folder::new()
        .with("1.toml", &tally_with("slow", "mode = 'from_beginning'", ":position + sleep(0.02)"));
    let boot = ["boot", "--batch=10", "--projectors", folder.path()];
    let booting = world.start(&boot);
    eventually("boot has applied events", || async {
        world.entry("slow").await.is_some_and(|slow| slow.position.get() > 20)
    })
    .await;
    booting.terminate().await.exits(143).prints(&["interrupted", "continues where it stopped"]);
    let stopped_at = world.position("slow").await;
    assert!((21..200).contains(&stopped_at), "{stopped_at}");
    assert_eq!(tally_positions(&world, "slow").await, (1..=stopped_at).collect::<Vec<_>>());

    world.run(&boot).await.exits(0);
    assert_eq!(tally_positions(&world, "slow").await, (1..=200).collect::<Vec<_>>());
}
