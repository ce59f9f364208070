//! What goes wrong in a handler: each event is applied once, or the projector is broken with the
//! reason.

use std::time::Duration;

use projectionist::sqlx::{self, AssertSqlSafe};
use serde_json::Value;
use tokio::process::Command;
use tokio::time::sleep;

use super::has_php;
use crate::support::{FinishedProcess, Folder, RunningProcess, World, eventually, seed};

/// A folder with the projector `tally`, whose handler has a fault.
fn folder(fault: &str, at: u64) -> Folder {
    let folder = Folder::new();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/handlers/tally.php");
    let file = folder.file("fault");
    folder.with(
        "tally.toml",
        &format!(
            "name = 'tally'\nversion = 1\nmode = 'from_beginning'\nevents = ['*']\n\
             command = ['php', '{script}']\npass_environment = ['HANDLER_DATABASE_URL']\n\
             [environment]\nFAULT = '{fault}'\nFAULT_AT = '{at}'\nFAULT_FILE = '{file}'\n"
        ),
    )
}

/// Boots 30 events through a handler with a fault at an event.
async fn boot(fault: &str, at: u64) -> (World, Folder, FinishedProcess) {
    let (world, folder) = (World::new().await, folder(fault, at));
    world.append(30).await;
    let mut command = world.handler_command(&folder, &["boot", "--wait-timeout", "2"]);
    command.args(["--batch", "10", "--handler-timeout", "1"]);
    let booted = RunningProcess::spawn(command).finish().await;
    (world, folder, booted)
}

async fn applied(world: &World) -> Vec<u64> {
    sqlx::query_scalar(AssertSqlSafe("select position from tally order by seq"))
        .fetch_all(&mut world.connection().await)
        .await
        .expect("the handler's table exists")
}

/// Asserts that the projector is at the end of the log, and has applied each event once, in order.
async fn assert_each_once(world: &World, count: u64) {
    assert_eq!(world.position("tally").await, count);
    assert_eq!(applied(world).await, (1..=count).collect::<Vec<u64>>());
}

#[tokio::test]
async fn a_handler_that_exits_after_its_commit_has_applied_its_batch_once() {
    if has_php() {
        let (world, _, booted) = boot("exit_after_commit", 0).await;
        booted.exits(0);
        assert_each_once(&world, 30).await;
    }
}

#[tokio::test]
async fn a_handler_that_ends_after_each_answer_is_started_again() {
    if has_php() {
        let (world, _, booted) = boot("exit_when_idle", 0).await;
        booted.exits(0);
        assert_each_once(&world, 30).await;
    }
}

#[tokio::test]
async fn a_transient_failure_is_tried_again_and_applies_each_event_once() {
    if has_php() {
        let (world, _, booted) = boot("once", 5).await;
        assert!(booted.clone().exits(0).stderr.contains("a deadlock"), "{booted:?}");
        assert_each_once(&world, 30).await;
    }
}

#[tokio::test]
async fn a_failing_event_breaks_the_projector_just_before_it() {
    if has_php() {
        let (world, _, booted) = boot("fails", 13).await;
        booted.exits(1);
        world.assert_broken("tally", 13, "a poison event").await;
        assert_eq!(applied(&world).await, (1..=12).collect::<Vec<u64>>());
    }
}

/// A handler that fails at event 13 in this way is broken there, with the reason.
async fn assert_breaks_at_13(fault: &str, because: &str) {
    if has_php() {
        let (world, _, booted) = boot(fault, 13).await;
        booted.exits(1);
        world.assert_broken("tally", 13, because).await;
        assert_eq!(applied(&world).await, (1..=12).collect::<Vec<u64>>());
    }
}

#[tokio::test]
async fn a_handler_that_prints_garbage_at_an_event_is_broken_there_with_the_garbage() {
    assert_breaks_at_13("garbage", "Warning: Undefined variable").await;
}

#[tokio::test]
async fn a_handler_that_prints_too_long_a_line_at_an_event_is_broken_there() {
    assert_breaks_at_13("long", "a line of more than 65536 bytes").await;
}

#[tokio::test]
async fn a_handler_that_exits_at_an_event_is_broken_there_with_its_exit_status() {
    assert_breaks_at_13("exit", "exit status: 7").await;
}

#[tokio::test]
async fn a_handler_that_is_too_slow_at_an_event_is_broken_there() {
    assert_breaks_at_13("slow", "longer than 1 s").await;
}

/// A handler with this fault must be rebuilt, for this reason.
async fn assert_must_be_rebuilt(fault: &str, because: &str) {
    if has_php() {
        let (world, _, booted) = boot(fault, 13).await;
        booted.exits(1);
        let entry = world.entry("tally").await.expect("it was registered");
        let reason = entry.rebuild_reason.expect("it must be rebuilt");
        assert!(reason.contains(because), "{reason}");
    }
}

#[tokio::test]
async fn a_handler_that_answers_done_without_the_fence_must_be_rebuilt() {
    assert_must_be_rebuilt("no_fence", "its transaction did not begin with the fence").await;
}

#[tokio::test]
async fn a_handler_that_swallows_an_error_and_answers_done_must_be_rebuilt() {
    assert_must_be_rebuilt("swallow", "or was rolled back").await;
}

#[tokio::test]
async fn a_handler_that_commits_the_fence_before_its_writes_must_be_rebuilt() {
    assert_must_be_rebuilt("early_commit", "committed the fence before it had applied").await;
}

#[tokio::test]
async fn a_handler_of_another_protocol_version_is_named_by_boot() {
    if has_php() {
        let (_world, _, booted) = boot("protocol", 0).await;
        assert!(booted.stderr.contains("it speaks version 2 of the protocol"), "{booted:?}");
        assert_ne!(booted.code, Some(0));
    }
}

/// Two workers play one projector while they and their handlers are killed at random. By hand, the
/// numbers are larger: HANDLER_KILLS=50 HANDLER_EVENTS=20000.
#[tokio::test]
async fn killed_workers_and_killed_handlers_apply_each_event_once_and_in_order() {
    if !has_php() {
        return;
    }
    let number =
        |name, default| std::env::var(name).map_or(default, |text| text.parse().expect("a number"));
    let (kills, events) = (number("HANDLER_KILLS", 6), number("HANDLER_EVENTS", 1_000));
    let mut random = fastrand::Rng::with_seed(seed());
    let (world, folder) = (World::new().await, folder("none", 0));
    let start = || {
        let mut command = world.handler_command(&folder, &["play", "--receive-wait", "1"]);
        command.args(["--batch", "50"]);
        RunningProcess::spawn(command)
    };
    let boot = world.handler_command(&folder, &["boot"]);
    RunningProcess::spawn(boot).finish().await.exits(0);
    let mut workers = [start(), start()];
    for kill in 0..kills {
        world.append((events / kills) as usize).await;
        sleep(Duration::from_millis(random.u64(0..400))).await;
        let worker = &mut workers[random.usize(0..2)];
        if kill % 2 == 0 {
            std::mem::replace(worker, start()).kill().await;
        } else if let Some(handler) = last_handler(worker) {
            // The handler may have ended already.
            let _ = Command::new("kill").args(["-9", &handler.to_string()]).status().await;
        }
    }
    let last = world.last_position().await;
    eventually("the projector reaches the end of the log", async || {
        world.position("tally").await == last || world.status("tally").await != "live"
    })
    .await;
    for worker in workers {
        worker.terminate().await.exits(0);
    }
    assert_eq!(world.status("tally").await, "live");
    assert_each_once(&world, last).await;
}

/// The process id of the handler that a worker started last.
fn last_handler(worker: &RunningProcess) -> Option<u64> {
    let log = worker.logged();
    let started = log.lines().rev().find(|line| line.contains("handler started"))?;
    serde_json::from_str::<Value>(started).ok()?["pid"].as_u64()
}
