//! The process of a handler: its environment, its log lines and its end.

use std::fs;
use std::path::Path;

use super::shell_handler as handler;
use crate::support::{RunningProcess, World, eventually};

#[tokio::test]
async fn a_handlers_environment_has_no_variable_that_the_file_does_not_name() {
    let world = World::new().await;
    let folder = handler("env > \"$OUT\"", "");
    let mut boot = world.handler_command(&folder, &["boot"]);
    boot.env("NAMED", "passed on").env("SECRET", "not named");
    RunningProcess::spawn(boot).finish().await.exits(0);
    let found = fs::read_to_string(folder.file("out")).expect("the handler has written it");
    assert!(found.contains("NAMED=passed on\n"), "{found}");
    for secret in ["SECRET=", "DATABASE_URL", "AWS_"] {
        assert!(!found.contains(secret), "{secret} is in: {found}");
    }
}

#[tokio::test]
async fn standard_error_of_a_handler_becomes_log_lines_with_the_projectors_name() {
    let world = World::new().await;
    let folder = handler("echo 'cache is cold' >&2", "");
    let boot = world.handler_command(&folder, &["boot"]);
    let log = RunningProcess::spawn(boot).finish().await.exits(0).log();
    let line = log.iter().find(|line| line["message"] == "handler: cache is cold");
    assert_eq!(line.expect("the handler's line")["projector"], "simple@1");
}

#[tokio::test]
async fn a_variable_that_is_named_and_not_set_is_named_by_boot() {
    let world = World::new().await;
    let folder = handler("", "");
    let mut boot = world.handler_command(&folder, &["boot"]);
    boot.env_remove("NAMED");
    let booted = RunningProcess::spawn(boot).finish().await;
    assert!(booted.stderr.contains("the variable NAMED is not set"), "{booted:?}");
    assert_ne!(booted.code, Some(0));
}

/// The handler ignores SIGTERM and the end of its input, and has a child of its own.
#[tokio::test]
async fn no_process_of_a_handler_outlives_its_worker_that_was_killed() {
    let world = World::new().await;
    let stubborn = "trap '' TERM; sleep 1000 & echo \"$! $$\" > \"$OUT\"";
    let folder = handler(stubborn, "sleep 1000");
    let boot = world.handler_command(&folder, &["boot"]);
    RunningProcess::spawn(boot).finish().await.exits(0);
    let ids = || fs::read_to_string(folder.file("out")).unwrap_or_default();
    assert_gone(&ids()).await;

    fs::remove_file(folder.file("out")).expect("the boot's handler has written it");
    world.append(1).await;
    let worker = RunningProcess::spawn(world.handler_command(&folder, &["play"]));
    eventually("the handler runs", async || ids().ends_with('\n')).await;
    assert!(worker.kill().await);
    assert_gone(&ids()).await;
}

async fn assert_gone(ids: &str) {
    for id in ids.split_whitespace() {
        eventually(&format!("process {id} ends"), async || {
            // A zombie has ended. In a container, its new parent may not collect it.
            let stat = fs::read_to_string(Path::new("/proc").join(id).join("stat"));
            stat.map_or(true, |stat| stat.contains(") Z "))
        })
        .await;
    }
}
