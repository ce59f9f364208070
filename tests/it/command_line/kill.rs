//! SIGKILL, and how much work is repeated. A statement on a table without transactions cannot be
//! rolled back, like a sent mail, so it records each event that was handled.

use super::{tally, tally_positions};
use crate::support::{Folder, World, eventually};

const BATCH: u64 = 10;
const EVENTS: u64 = 200;
const KILLS: u64 = 6;

impl World {
    /// The number of handled events beyond the position. They belong to an uncommitted batch.
    async fn uncommitted_count(&self) -> u64 {
        let beyond = "position > coalesce((select position from projectors where name = 'a'), 0)";
        self.number(&format!("select count(distinct position) from handled where {beyond}")).await
    }

    async fn handled(&self) -> u64 {
        self.number("select count(*) from handled").await
    }
}

/// A projector that records each event that it handles, slowly enough for a kill within a batch.
async fn traced_projector_folder(world: &World) -> Folder {
    world.execute("create table handled (position bigint not null) engine = myisam").await;
    let traces = "[[on]]\nevents = ['*']\nsql = 'insert into handled (position) \
                  values (:position + sleep(0.02))'\n";
    Folder::new().with("1.toml", &format!("{}\n{traces}", tally("a")))
}

/// Runs a command repeatedly and kills it within a batch each time, then runs `to_the_end`.
async fn assert_a_kill_repeats_at_most_a_batch(
    world: &World,
    command: &[&str],
    to_the_end: &[&str],
) {
    for kill in 1..=KILLS {
        let running = world.start(command);
        let reached = kill * EVENTS / (KILLS + 1);
        eventually("a batch is partly handled", async || {
            world.uncommitted_count().await >= 3 && world.handled().await > reached
        })
        .await;
        assert!(running.kill().await, "the process was running");
    }
    world.run(to_the_end).await.exits(0);
    let (handled, again) = (world.handled().await, world.handled().await - EVENTS);
    assert!(
        (1..=BATCH * KILLS).contains(&again),
        "{again} of {handled} were handled again, after {KILLS} kills"
    );
    assert_eq!(world.number("select count(distinct position) from handled").await, EVENTS);
    assert_eq!(
        tally_positions(world, "a").await,
        (1..=EVENTS).collect::<Vec<_>>(),
        "each event is applied once"
    );
}

#[tokio::test]
async fn no_more_than_a_batch_is_handled_again_after_a_boot_was_killed() {
    let world = World::new().await;
    let folder = traced_projector_folder(&world).await;
    world.append(EVENTS as usize).await;
    let boot = ["boot", "--batch=10", "--projectors", folder.path()];
    assert_a_kill_repeats_at_most_a_batch(&world, &boot, &boot).await;
}

#[tokio::test]
async fn no_more_than_a_batch_is_handled_again_after_play_was_killed() {
    let world = World::new().await;
    let folder = traced_projector_folder(&world).await;
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.append(EVENTS as usize).await;
    // A long limit, so that the projector is not moved to the background. That would also repeat
    // events.
    let play = [
        "play",
        "--batch=10",
        "--visibility-timeout=3",
        "--background-after-seconds=60",
        "--projectors",
        folder.path(),
    ];
    assert_a_kill_repeats_at_most_a_batch(&world, &play, &[&play[..], &["--until-idle"]].concat())
        .await;
}
