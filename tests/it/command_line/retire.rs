//! `retire`: it asks, tears down, and keeps a projector with side effects retired.

use std::process::Stdio;

use tokio::process::Command;

use super::{tally, tally_positions, tally_with};
use crate::support::{Folder, RunningProcess, World};

async fn has_table(world: &World, name: &str) -> bool {
    let sql = "select count(*) from information_schema.tables where table_schema = database() \
               and table_name";
    world.number(&format!("{sql} = '{name}'")).await == 1
}

async fn booted(files: &[(&str, &str)]) -> (World, Folder) {
    let world = World::new().await;
    world.append(5).await;
    let folder = Folder::new();
    for (name, text) in files {
        folder.write(name, text);
    }
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    (world, folder)
}

#[tokio::test]
async fn retire_drops_the_tables_and_the_ledger_row() {
    let (world, folder) = booted(&[("1.toml", &tally("a")), ("2.toml", &tally("b"))]).await;
    let arguments = ["retire", "a", "--yes", "--force", "--projectors", folder.path()];
    let retired = world.run(&arguments).await.exits(0);
    assert!(
        retired.stdout.contains("a@1 is retired: its tables are torn down"),
        "{}",
        retired.stdout
    );
    assert_eq!((has_table(&world, "a").await, world.status("a").await), (false, "new".into()));
    assert_eq!(
        (tally_positions(&world, "b").await.len(), world.status("b").await),
        (5, "live".into()),
        "the other projector is unchanged"
    );
    world.run(&arguments).await.exits(2).prints(&["no projector \"a\"", "b@1"]);
}

#[tokio::test]
async fn retire_without_the_file_deletes_the_ledger_row_and_keeps_the_tables() {
    let (world, _folder) = booted(&[("1.toml", &tally("a"))]).await;
    let retired = world.run(&["retire", "a", "--yes"]).await.exits(0);
    assert!(retired.stdout.contains("its tables stay"), "{}", retired.stdout);
    assert_eq!(
        (tally_positions(&world, "a").await.len(), world.status("a").await),
        (5, "new".into())
    );
}

#[tokio::test]
async fn a_live_projector_in_the_set_is_retired_only_by_force() {
    let (world, folder) = booted(&[("1.toml", &tally("a"))]).await;
    let arguments = ["retire", "a", "--yes", "--projectors", folder.path()];
    world.run(&arguments).await.exits(2).prints(&[
        "a@1 is live in this set",
        "remove it from the set",
        "--force",
    ]);
    assert_eq!(
        (tally_positions(&world, "a").await.len(), world.status("a").await),
        (5, "live".into())
    );
    world.run(&[&arguments[..], &["--force"]].concat()).await.exits(0);
    assert_eq!(world.status("a").await, "new");
}

#[tokio::test]
async fn a_retired_projector_with_side_effects_is_never_booted_or_played_again() {
    let mails = tally_with("mails", "mode = 'from_beginning'\nside_effects = true", ":position");
    let (world, folder) = booted(&[("1.toml", &mails), ("2.toml", &tally("a"))]).await;
    let without = Folder::new().with("2.toml", &tally("a"));
    let retire = ["retire", "mails", "--yes", "--projectors", without.path()];
    let retired = world.run(&retire).await.exits(0);
    assert!(
        retired.stdout.contains("its row stays, as retired, permanently"),
        "{}",
        retired.stdout
    );
    assert_eq!(world.status("mails").await, "retired");
    assert!(world.run(&retire).await.exits(0).stdout.contains("retired already"));

    // A later release contains the projector again.
    world.append(5).await;
    let booted = world.run(&["boot", "--json", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(booted.json()["projectors"][0]["status"], "retired");
    assert!(
        booted.log().iter().any(|line| line["level"] == "WARN" && line["projector"] == "mails@1"),
        "{}",
        booted.stderr
    );
    world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(
        (tally_positions(&world, "a").await.len(), tally_positions(&world, "mails").await.len()),
        (10, 5)
    );
    assert_eq!((world.status("mails").await, world.position("mails").await), ("retired".into(), 5));
}

#[tokio::test]
async fn a_version_is_retired_by_name_and_version() {
    let second =
        tally("b").replace("name = 'b'", "name = 'a'").replace("version = 1", "version = 2");
    let (world, folder) = booted(&[("1.toml", &tally("a")), ("2.toml", &second)]).await;
    world.run(&["retire", "a@1", "--yes", "--force", "--projectors", folder.path()]).await.exits(0);
    let left = world.ledger.entries().await.expect("the ledger is readable");
    assert_eq!(left.iter().map(|entry| entry.id.to_string()).collect::<Vec<_>>(), ["a@2"]);
    assert_eq!((has_table(&world, "a").await, has_table(&world, "b").await), (false, true));
    world.run(&["retire", "a", "--yes"]).await.exits(0);
    assert!(world.ledger.entries().await.expect("the ledger is readable").is_empty());
}

#[tokio::test]
async fn without_a_terminal_retire_needs_yes() {
    let (world, _folder) = booted(&[("1.toml", &tally("a"))]).await;
    let refused = world.run_with(&["retire", "a"], b"y\n").await.exits(2);
    refused.prints(&["a@1 (live, position 5) will be retired", "no terminal to ask on", "--yes"]);
    assert_eq!(world.status("a").await, "live");
}

/// util-linux's `script` runs a command in a new terminal.
#[tokio::test]
async fn on_a_terminal_retire_asks_and_follows_the_answer() {
    let (world, _folder) = booted(&[("1.toml", &tally("a"))]).await;
    if Command::new("script").arg("--version").stdout(Stdio::null()).status().await.is_err() {
        eprintln!("skipped: `script` (util-linux) is not installed");
        return;
    }
    for (answer, code, said, status) in [
        ("n\n", 2, "not confirmed; nothing was done", "live"),
        ("\n", 2, "not confirmed; nothing was done", "live"),
        ("y\n", 0, "a@1 is retired", "new"),
    ] {
        let ours = world.command(&[]);
        let program = ours.as_std().get_program().to_str().expect("the path is UTF-8").to_owned();
        let mut terminal = Command::new("script");
        terminal.args([
            "--quiet",
            "--return",
            "--command",
            &format!("{program} retire a"),
            "/dev/null",
        ]);
        let variables = ours.as_std().get_envs().filter_map(|(name, value)| Some((name, value?)));
        terminal
            .envs(variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let finished =
            RunningProcess::spawn_with(terminal, answer.as_bytes()).finish().await.exits(code);
        for words in ["a@1 (live, position 5) will be retired", "Continue? [y/N]", said] {
            assert!(finished.stdout.contains(words), "{words} in {}", finished.stdout);
        }
        assert_eq!(world.status("a").await, status);
    }
}

#[tokio::test]
async fn a_failing_teardown_is_reported_and_can_be_run_again() {
    let broken = tally("a").replace("'drop table if exists a'", "'drop table no_such_table'");
    let (world, folder) = booted(&[("1.toml", &broken)]).await;
    let arguments = ["retire", "a", "--yes", "--force", "--projectors", folder.path()];
    let failed = world.run(&arguments).await.exits(1);
    failed.prints(&[
        "a@1: its teardown failed",
        "1.toml:5",
        "no_such_table",
        "retire can be run again",
    ]);
    assert_eq!(
        world.status("a").await,
        "retired",
        "a projector must not be played during its teardown"
    );
    folder.write("1.toml", &tally("a"));
    world.run(&arguments).await.exits(0);
    assert_eq!((has_table(&world, "a").await, world.status("a").await), (false, "new".into()));
}
