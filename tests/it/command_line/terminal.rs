//! What a person sees on a terminal: the width, the colours, the whole error.

use tokio::process::Command;

use super::{failing_at, tally};
use crate::support::{Folder, RunningProcess, World};

/// Variables that change colours. A test removes them all before it sets some.
const COLOR_VARIABLES: [&str; 4] = ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "CI"];

/// Runs the binary on a pseudo-terminal of this width. Returns its exit code, and its output and
/// log as the terminal received them.
async fn run_on_terminal(
    world: &World,
    columns: u32,
    variables: &[(&str, &str)],
    arguments: &[&str],
) -> (Option<i32>, String) {
    let program = world.command(&[]);
    let mut command = Command::new("script");
    for (name, value) in program.as_std().get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    COLOR_VARIABLES.iter().for_each(|name| {
        command.env_remove(name);
    });
    let run = format!(
        "stty cols {columns} rows 50 -onlcr; exec {} {}",
        env!("CARGO_BIN_EXE_projectionist"),
        arguments.iter().map(|argument| format!("'{argument}'")).collect::<Vec<_>>().join(" ")
    );
    command
        .args(["-qec", &run, "/dev/null"])
        .env("TERM", "xterm")
        .envs(variables.iter().copied())
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let ended = RunningProcess::spawn(command).finish().await;
    (ended.code, ended.stdout)
}

/// Whether a text sets a colour or a style.
fn is_colored(text: &str) -> bool {
    text.split("\u{1b}[").skip(1).any(|rest| {
        rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with('m')
    })
}

/// The lines of a text without escape sequences.
fn plain_lines(text: &str) -> Vec<String> {
    let mut parts = text.split("\u{1b}[");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        plain.push_str(part.split_once(|c: char| c.is_ascii_alphabetic()).unwrap_or_default().1);
    }
    plain.lines().map(|line| line.trim_end_matches('\r').to_owned()).collect()
}

const LONG_NAME: &str = "a_projector_with_a_name_of_sixty_four_characters_in_all_which_is";

/// A world with 40 projectors in the ledger, one of them broken with a long error of many lines.
async fn world_with_forty_projectors() -> World {
    let world = World::new().await;
    world.append(5).await;
    let mut rows: Vec<String> = (0..38)
        .map(|number| {
            format!(
                "('projector_{number}', 'live', 5, null, null, null, null, 1, 'from_beginning', 0)"
            )
        })
        .collect();
    rows.push(format!(
        "('{LONG_NAME}', 'live', 5, null, null, null, null, 1, 'from_beginning', 0)"
    ));
    rows.push(
        "('poisoned', 'broken', 3, concat('its beginning', repeat('\\na line of the error', 40), \
         '\\nits end'), utc_timestamp(6), 2, \
         'web-1', 1, 'from_beginning', 0)"
            .to_owned(),
    );
    world
        .execute(&format!(
            "insert into projectors (name, status, position, failed_error, failed_at, \
             failed_attempts, failed_host, version, mode, has_side_effects) values {}",
            rows.join(", ")
        ))
        .await;
    world
}

#[tokio::test]
async fn status_of_forty_projectors_fits_the_terminal_and_begins_with_the_broken_one() {
    let world = world_with_forty_projectors().await;
    for columns in [80, 120] {
        let (code, shown) = run_on_terminal(&world, columns, &[], &["status"]).await;
        assert_eq!(code, Some(0), "{shown}");
        let lines = plain_lines(&shown);
        assert_eq!(lines[0], "40 projectors: 1 broken, 39 live");
        assert!(lines[4].starts_with("broken ") && lines[4].ends_with("poisoned@1"), "{shown}");
        let text = lines.join("\n");
        for words in ["its beginning", "its end", "lines cut: projectionist status poisoned@1]"] {
            assert!(text.contains(words), "{words} in {shown}");
        }
        assert!(text.contains(&format!("{LONG_NAME}@1")), "the name is whole: {shown}");
        let long: Vec<&String> =
            lines.iter().filter(|line| line.chars().count() > columns as usize).collect();
        assert!(long.is_empty(), "{long:?}");
    }
    let (_, whole) = run_on_terminal(&world, 80, &[], &["status", "poisoned"]).await;
    assert_eq!(whole.matches("a line of the error").count(), 40, "{whole}");
    // A pipe gets a line for each projector, and the whole error.
    let piped = world.run(&["status"]).await.exits(0).stdout;
    assert_eq!(piped.matches("a line of the error").count(), 40, "{piped}");
    assert!(!piped.contains('\u{1b}'), "{piped}");
}

#[tokio::test]
async fn logs_and_reports_have_colours_only_if_the_terminal_and_the_user_want_them() {
    let world = World::new().await;
    world.append(3).await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    let boot = ["boot", "--projectors", folder.path()];
    let status = ["status"];
    world.run(&boot).await.exits(0);
    for arguments in [&boot[..], &status] {
        for (variables, expected) in [
            (&[][..], true),
            (&[("NO_COLOR", "1")], false),
            (&[("NO_COLOR", "1"), ("CLICOLOR_FORCE", "1")], false),
            (&[("CLICOLOR", "0")], false),
            (&[("TERM", "dumb")], false),
            (&[("TERM", "dumb"), ("CLICOLOR_FORCE", "1")], true),
        ] {
            let (code, shown) = run_on_terminal(&world, 80, variables, arguments).await;
            assert_eq!(code, Some(0), "{shown}");
            assert_eq!(is_colored(&shown), expected, "{arguments:?} with {variables:?}: {shown:?}");
            assert!(expected || !shown.contains("\u{1b}[3"), "{shown:?}");
        }
    }
    for (force, expected) in [("", false), ("1", true)] {
        let mut command = world.command(&["status"]);
        command.env("CLICOLOR_FORCE", force).env_remove("NO_COLOR");
        let piped = RunningProcess::spawn(command).finish().await.exits(0).stdout;
        assert_eq!(is_colored(&piped), expected, "{piped:?}");
    }
}

#[tokio::test]
async fn a_dumb_terminal_gets_no_progress_bar_and_another_one_gets_a_bar_that_fits() {
    let world = World::new().await;
    world.append(50).await;
    let folder = Folder::new().with("1.toml", &tally("a")).with("2.toml", &failing_at("b", 40));
    let boot = ["boot", "--batch=1", "--log=warn", "--projectors", folder.path()];
    let dumb = [("TERM", "dumb")];
    let (code, shown) = run_on_terminal(&world, 80, &dumb, &boot).await;
    assert_eq!(code, Some(1), "{shown}");
    assert!(!shown.contains('\u{1b}') && !shown.contains("events"), "{shown:?}");
    world.append(5_000).await;
    let fixed = Folder::new().with("1.toml", &tally("a")).with("2.toml", &tally("b"));
    let ascii = [("LC_ALL", "C")];
    let boot = ["boot", "--batch=50", "--log=warn", "--projectors", fixed.path()];
    let (code, shown) = run_on_terminal(&world, 80, &ascii, &boot).await;
    assert_eq!(code, Some(0), "{shown}");
    assert!(shown.contains("/5,050 events") && shown.contains("2 projectors"), "{shown:?}");
    assert!(shown.is_ascii(), "LC_ALL=C: {shown:?}");
    let bars = plain_lines(&shown.replace('\r', "\n"));
    assert!(bars.iter().all(|line| line.chars().count() <= 80), "{bars:?}");
}

#[tokio::test]
async fn json_on_a_terminal_is_one_line_without_colours() {
    let world = world_with_forty_projectors().await;
    let (_, shown) =
        run_on_terminal(&world, 80, &[("CLICOLOR_FORCE", "1")], &["status", "--json"]).await;
    assert_eq!(shown.lines().count(), 1, "{shown}");
    let json: serde_json::Value = serde_json::from_str(&shown).expect("the output is JSON");
    assert_eq!(json["projectors"].as_array().map(Vec::len), Some(40));
}
