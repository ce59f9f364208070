//! A custom binary has every command of the shipped one.

use std::path::{Path, PathBuf};

use projectionist::sqlx;
use tokio::process::Command;

use crate::support::{FinishedProcess, RunningProcess, World};

/// The path of `examples/worker.rs`. Cargo builds it with the tests, unless only some of them are
/// selected.
async fn worker() -> PathBuf {
    let ours = Path::new(env!("CARGO_BIN_EXE_projectionist"));
    let worker = ours.parent().expect("the binary is in a folder").join("examples/worker");
    if !worker.exists() {
        let built =
            Command::new(env!("CARGO")).args(["build", "--example", "worker"]).status().await;
        assert!(built.expect("cargo starts").success(), "the example is built");
    }
    worker
}

#[tokio::test]
async fn a_custom_binary_boots_and_plays_its_own_projectors() {
    let world = World::new().await;
    let worker = worker().await;
    let run = async |arguments: &[&str]| -> FinishedProcess {
        let ours = world.command(arguments);
        let mut theirs = Command::new(&worker);
        theirs
            .args(arguments)
            .envs(ours.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
        theirs
            .env_remove("PROJECTORS")
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        RunningProcess::spawn(theirs).finish().await
    };
    let events = |department: &str, count: usize| {
        let line = serde_json::json!({
            "stream_id": format!("case-{department}"), "event_type": "Confirmation of receipt",
            "payload": {"department": department},
        })
        .to_string();
        vec![line; count].join("\n")
    };
    world.run_with(&["append"], events("General", 3).as_bytes()).await.exits(0);
    run(&["boot"]).await.exits(0);
    world.run_with(&["append"], events("Experts", 2).as_bytes()).await.exits(0);
    let played = run(&["play", "--until-idle"]).await.exits(0);
    let announced =
        played.stdout.lines().filter(|line| line.starts_with("idempotency-key ")).count();
    assert_eq!(announced, 2, "the reactor must handle only the new events: {}", played.stdout);

    let cases: Vec<(String, i64)> =
        sqlx::query_as("select department, cases from cases_per_department order by department")
            .fetch_all(&mut world.connection().await)
            .await
            .expect("the table exists");
    assert_eq!(cases, [("Experts".into(), 2), ("General".into(), 3)]);

    let status = run(&["status", "--json"]).await.exits(0).json();
    assert_eq!(status["projectors"].as_array().map(Vec::len), Some(2));
    let help = run(&["--help"]).await.exits(0).stdout;
    for command in ["migrate", "append", "boot", "play", "relay", "status", "retire"] {
        assert!(help.contains(&format!("  {command} ")), "{command} in {help}");
    }
    run(&["retire", "cases_per_department", "--yes", "--force"]).await.exits(0);
    assert_eq!(world.status("cases_per_department").await, "new");
}
