//! The audit: what it proves while everything runs, and what it refutes.

use projectionist::Registry;

use crate::support::{Tally, World};

/// A world whose mark has passed so many events.
async fn passed(events: usize) -> World {
    let world = World::new().await;
    world.append(events).await;
    world.run(&["relay", "--once"]).await.exits(0);
    world
}

#[tokio::test]
async fn a_log_that_is_what_it_was_is_found_well_also_with_tombstones_and_while_it_grows() {
    let world = World::new().await;
    let tally = Tally::new("tally");
    let registry = Registry::new().with(tally.clone()).expect("one name");
    world.append(50).await;
    // A rollback between them leaves a hole, and the mark a tombstone in it.
    world.execute("begin; insert into events (stream_id, stream_version, event_type, payload) values ('x', 1, 'X', '1'); rollback").await;
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
    assert_eq!((report["well"].as_bool(), report["rows"].as_u64()), (Some(true), Some(301)), "{report}");
    world.assert_complete(&tally).await;
}

#[tokio::test]
async fn a_deleted_row_is_named() {
    let world = passed(30).await;
    world.execute("delete from events where position in (7, 30)").await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert_eq!(audit.stdout, "position 7 has no row: it was deleted\nposition 30 has no row: it was deleted\n");
    assert!(audit.stderr.contains("\"alert\":\"log_fault\""), "{}", audit.stderr);
}

#[tokio::test]
async fn a_row_that_was_replaced_is_found() {
    let world = passed(30).await;
    world.execute("update events set event_id = 'another' where position = 7").await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert!(audit.stdout.contains("not those over which the high-water mark passed"), "{}", audit.stdout);
}

#[tokio::test]
async fn a_projector_beyond_the_mark_is_named() {
    let world = passed(30).await;
    world.boot(&Registry::new().with(Tally::new("tally")).expect("one name")).await;
    world.execute("update projectors set position = 31").await;
    let audit = world.run(&["audit"]).await.exits(1);
    assert_eq!(audit.stdout, "projector tally@1 stands at 31, beyond the high-water mark 30\n");
}
