//! `docs/command-line.md` against `--help`: every command, option, variable and default.

use std::collections::BTreeMap;
use std::process::Command;

use super::page::{Page, rows};

/// What a command's help, or the page, says of an option: its variable and its default.
type Options = BTreeMap<String, (String, String)>;

#[test]
fn the_page_lists_every_command() {
    let page = Page::read("docs/command-line.md");
    let (head, _) = page.text.split_once("\n## ").expect("a table before the first section");
    let listed: Vec<&str> =
        rows(head).iter().map(|cells| cells[0].split('`').nth(1).expect("a name")).collect();
    assert_eq!(listed, commands());
}

#[test]
fn the_page_lists_every_option_with_its_variable_and_its_default() {
    let page = Page::read("docs/command-line.md");
    let common = listed(page.section("Common options"));
    for command in commands() {
        let help = help(&[&command, "--help"]);
        // The common options begin with those about projectors.
        let (own, of_all) = help.split_once("\nProjectors:\n").expect("the common options");
        assert_same(&format!("the common options of {command}"), &options(of_all), &common);
        assert_same(&command, &options(own), &listed(page.section(&command)));
    }
}

fn assert_same(what: &str, help: &Options, page: &Options) {
    for (option, (variable, default)) in help {
        let (listed_variable, listed_default) = page
            .get(option)
            .unwrap_or_else(|| panic!("docs/command-line.md lacks {option} of {what}"));
        assert_eq!(variable, listed_variable, "{option} of {what}");
        let is_explained = default.is_empty() || listed_default == "see below";
        assert!(
            is_explained || default == listed_default,
            "{option} of {what}: {default}, not {listed_default}"
        );
    }
    let unknown: Vec<&String> = page.keys().filter(|option| !help.contains_key(*option)).collect();
    assert!(unknown.is_empty(), "{what} has no {unknown:?}");
}

/// The options of the tables in a section.
fn listed(section: &str) -> Options {
    let rows = rows(section).into_iter().filter(|cells| cells[0].starts_with("`--"));
    let option = |cells: Vec<&str>| {
        let name = cells[0].trim_matches('`').split(' ').next().expect("a name").to_owned();
        (name, (cells[1].trim_matches('`').to_owned(), cells[2].trim_matches('`').to_owned()))
    };
    rows.map(option).collect()
}

/// The options in a help text. An option's line is indented by six blanks, its description by more.
fn options(help: &str) -> Options {
    let mut options = Options::new();
    let mut last = String::new();
    for line in help.lines() {
        if line.starts_with("      --") {
            last = line.trim().split(' ').next().expect("a name").to_owned();
            options.insert(last.clone(), Default::default());
        }
        let Some((variable, default)) = options.get_mut(&last) else { continue };
        if let Some(text) = line.trim().strip_prefix("[env: ") {
            *variable = text.split(['=', ']']).next().expect("a name").to_owned();
        }
        if let Some(text) = line.trim().strip_prefix("[default: ") {
            *default = text.trim_end_matches(']').replace(' ', ",");
        }
    }
    options
}

fn commands() -> Vec<String> {
    let help = help(&["--help"]);
    let (_, rest) = help.split_once("Commands:\n").expect("the commands");
    let listed = rest.lines().take_while(|line| !line.trim().is_empty()).filter_map(|line| {
        // A long description goes on below, deeper.
        let line = line.strip_prefix("  ").filter(|line| !line.starts_with(' '))?;
        line.split(' ').next()
    });
    listed.filter(|command| *command != "help").map(str::to_owned).collect()
}

fn help(arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_projectionist"));
    let output = command.args(arguments).env_clear().output().expect("the binary runs");
    assert!(output.status.success(), "{arguments:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}
