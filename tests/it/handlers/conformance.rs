//! The conformance kit: our clients pass it, and wrong handlers are caught.

use serde_json::Value;
use tokio::process::Command;

use super::{has_php, has_python, has_typescript};
use crate::support::{Folder, RunningProcess, World};

/// The cases that do not hold for a handler, with the reasons.
async fn failing_cases(command: &[&str], fault: &str) -> Vec<(String, String)> {
    let (world, folder) = (World::new().await, Folder::new());
    let mut kit: Command = world.handler_command(&folder, &["conformance", "--json", "--"]);
    kit.args(command).env("FAULT", fault).env("TALLY", "conformance").env_remove("PROJECTORS");
    let ended = RunningProcess::spawn(kit).finish().await;
    let reports = ended.json();
    let failing: Vec<(String, String)> = reports
        .as_array()
        .expect("a list of cases")
        .iter()
        .filter(|report| report["holds"] == false)
        .map(|report| {
            let text = |key: &str| report[key].as_str().expect("a text").to_owned();
            (text("case"), text("reason"))
        })
        .collect();
    assert_eq!(ended.code, Some(i32::from(!failing.is_empty())), "{ended:?}");
    assert!(reports.as_array().map_or(0, Vec::<Value>::len) >= 16, "{reports}");
    failing
}

fn example(file: &str) -> String {
    format!("{}/examples/handlers/{file}", env!("CARGO_MANIFEST_DIR"))
}

#[tokio::test]
async fn the_php_client_passes_the_conformance_kit() {
    if has_php() {
        assert_eq!(failing_cases(&["php", &example("php/conformance.php")], "").await, []);
    }
}

#[tokio::test]
async fn the_python_client_passes_the_conformance_kit() {
    if has_python() {
        assert_eq!(failing_cases(&["python3", &example("python/conformance.py")], "").await, []);
    }
}

#[tokio::test]
async fn the_typescript_client_passes_the_conformance_kit() {
    if has_typescript() {
        let command = ["node", &example("typescript/conformance.js")];
        assert_eq!(failing_cases(&command, "").await, []);
    }
}

/// Asserts that a handler with this fault fails this case for this reason.
async fn assert_caught(fault: &str, case: &str, because: &str) {
    if has_php() {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/handlers/tally.php");
        let failing = failing_cases(&["php", script], fault).await;
        let is_caught =
            |(found, reason): &(String, String)| found.contains(case) && reason.contains(because);
        assert!(failing.iter().any(is_caught), "{failing:?}");
    }
}

#[tokio::test]
async fn the_kit_catches_a_handler_without_the_fence() {
    assert_caught("no_fence", "a batch is applied", "the position is 0, and must be 3").await;
}

#[tokio::test]
async fn the_kit_catches_a_handler_that_commits_the_fence_early() {
    assert_caught("early_commit", "a failing event fails the batch", "the position is").await;
}

#[tokio::test]
async fn the_kit_catches_a_handler_that_swallows_errors() {
    assert_caught("swallow", "a failing event fails the batch", "it answered Done").await;
}
