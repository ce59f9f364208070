//! The documentation is checked: its links lead somewhere, the tests that it names exist, its
//! commands, projector files and statements run, and its options are those of the program.
//! (`src/lib.rs` compiles its Rust.)

mod book;
mod commands;
mod page;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;

use projectionist::Registry;
use tokio::process::Command;

use crate::support::{Folder, RunningProcess, World};
use page::{Page, root, rows};

const MOST_LINES_OF_THE_README: usize = 150;

/// Every part of `docs/guarantees.md` that is a test's name leads to the file that has the test.
#[test]
fn every_test_that_the_guarantees_name_exists() {
    let page = Page::read("docs/guarantees.md");
    let named: Vec<(String, String)> =
        page.definitions().into_iter().filter(|(_, target)| target.ends_with(".rs")).collect();
    assert!(named.len() > 100, "the page lists its tests: {named:?}");
    for (test, target) in named {
        let file = resolve(&page, &target);
        let text = fs::read_to_string(root().join(&file))
            .unwrap_or_else(|error| panic!("{test} in {target}: {error}"));
        assert!(
            text.contains(&format!("fn {test}(")),
            "no test in {} is called {test}",
            file.display()
        );
    }
}

#[test]
fn every_relative_link_and_anchor_of_every_page_resolves() {
    let mut broken = Vec::new();
    for page in Page::all() {
        for link in page.links().iter().filter(|link| is_relative(link)) {
            if let Err(reason) = check_link(&page, link) {
                broken.push(format!("{}: {link}: {reason}", page.path.display()));
            }
        }
        let defined: BTreeSet<String> =
            page.definitions().into_iter().map(|(name, _)| name).collect();
        for name in page.references().iter().filter(|name| !defined.contains(*name)) {
            broken.push(format!("{}: [`{name}`] has no definition", page.path.display()));
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn the_readme_is_short() {
    let lines = Page::read("README.md").text.lines().count();
    assert!(lines <= MOST_LINES_OF_THE_README, "README.md has {lines} lines");
}

/// crates.io resolves the README's relative links in the repository, so they work there, in a
/// checkout and in an unpacked crate, if the crate has each file. The documentation of the crate
/// has no relative links at all: docs.rs has only items.
#[test]
fn every_relative_link_of_the_readme_is_in_the_package_and_the_crates_own_page_has_none() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).expect("the manifest");
    let excluded = manifest
        .lines()
        .find_map(|line| line.strip_prefix("exclude = "))
        .expect("what is excluded");
    let excluded: Vec<&str> =
        excluded.split('"').skip(1).step_by(2).map(|path| path.trim_start_matches('/')).collect();
    let readme = Page::read("README.md");
    for link in readme.links().iter().filter(|link| is_relative(link)) {
        let path = resolve(&readme, link);
        assert!(
            !excluded.iter().any(|folder| path.starts_with(folder)),
            "{link} is not in the package"
        );
    }
    let lib = fs::read_to_string(root().join("src/lib.rs")).expect("the crate");
    let documentation =
        lib.lines().filter_map(|line| line.strip_prefix("//!")).collect::<Vec<_>>().join("\n");
    let relative = documentation.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    let relative: Vec<&str> =
        relative.filter(|link| link.contains(['/', '#']) && !link.contains("://")).collect();
    assert!(relative.is_empty(), "docs.rs has no {relative:?}");
}

#[test]
fn every_page_is_in_the_book() {
    let summary = Page::read("docs/SUMMARY.md").links();
    let pages = Page::all()
        .into_iter()
        .filter_map(|page| Some(page.path.strip_prefix("docs").ok()?.to_owned()));
    let missing: Vec<PathBuf> = pages
        .filter(|page| {
            page != Path::new("SUMMARY.md") && !summary.iter().any(|link| Path::new(link) == page)
        })
        .collect();
    assert!(missing.is_empty(), "docs/SUMMARY.md does not list {missing:?}");
}

/// Otherwise nothing would compile it.
#[test]
fn every_page_with_rust_is_a_doctest() {
    let lib = fs::read_to_string(root().join("src/lib.rs")).expect("the crate");
    for page in Page::all() {
        let has_rust = page.blocks().iter().any(|block| block.language.starts_with("rust"));
        let include = format!("include_str!(\"../{}\")", page.path.display());
        assert!(!has_rust || lib.contains(&include), "src/lib.rs does not have {include}");
    }
}

#[test]
fn every_projector_file_of_the_pages_loads() {
    let mut loaded = 0;
    for page in Page::all() {
        let files = page
            .blocks()
            .into_iter()
            .filter(|block| block.language == "toml" && block.code.contains("[[on]]"));
        for file in files {
            let folder = Folder::new().with("projector.toml", &file.code);
            let mut registry = Registry::new();
            projectionist::load(Path::new(folder.path()), &mut registry)
                .unwrap_or_else(|error| panic!("{}: {error}", page.path.display()));
            loaded += registry.len();
        }
    }
    assert!(loaded >= 2, "the pages have projector files");
}

/// The README's example: its file, then its commands, in a folder of its own.
#[tokio::test]
async fn the_readmes_projector_file_is_booted_and_played_by_the_readmes_commands() {
    let world = World::new().await;
    let folder = Folder::new();
    let blocks = page::blocks(Page::read("README.md").section("A projector in a file"));
    let [file, commands] = &blocks[..] else { panic!("a file and its commands: {blocks:?}") };
    let path = file
        .code
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("# "))
        .expect("the name of the file");
    fs::create_dir(Path::new(folder.path()).join("projectors")).expect("a folder");
    folder.write(path, &file.code);
    run_in_shell(&world, &folder, &commands.code).await;
    assert_eq!(world.number("select count(*) from case_status").await, 1);
    assert_eq!(world.status("case_status").await, "live");
}

/// The statement appends version 7 of a stream, and the command an event after it.
#[tokio::test]
async fn the_statement_and_the_command_of_the_page_on_appending_append() {
    let world = World::new().await;
    let page = Page::read("docs/appending.md");
    for block in page.blocks() {
        match block.language.as_str() {
            "sql" => world.execute(&block.code).await,
            "sh" => run_in_shell(&world, &Folder::new(), &block.code).await,
            _ => {}
        }
    }
    assert_eq!(world.number("select count(*) from events where stream_id = 'case-891'").await, 2);
}

/// The symptoms that are quoted are what the program prints: its messages, alerts and words.
#[test]
fn every_symptom_that_the_page_on_operations_quotes_is_in_the_source() {
    let source = without_line_breaks(&text_of(&root().join("src")));
    let page = Page::read("docs/operations.md");
    let symptoms: Vec<&str> = rows(&page.text).into_iter().map(|cells| cells[0]).collect();
    assert!(symptoms.len() > 20, "the page has its tables");
    let quoted = symptoms.iter().flat_map(|symptom| symptom.split('`').skip(1).step_by(2));
    let missing: Vec<&str> = quoted
        .flat_map(|text| text.split('…'))
        .map(|part| part.trim_matches([' ', ',']))
        .filter(|part| !source.contains(part))
        .collect();
    assert!(missing.is_empty(), "nothing prints {missing:?}");
}

fn is_relative(link: &str) -> bool {
    !link.contains("://") && !link.starts_with("mailto:")
}

/// The file that a relative link of a page leads to, from the root of the repository.
fn resolve(page: &Page, link: &str) -> PathBuf {
    let (path, _) = link.split_once('#').unwrap_or((link, ""));
    if path.is_empty() {
        return page.path.clone();
    }
    let mut resolved = page.path.parent().expect("a page is in a folder").to_owned();
    for part in Path::new(path).components() {
        match part {
            Component::ParentDir => {
                assert!(resolved.pop(), "{link} of {} leaves the repository", page.path.display())
            }
            Component::CurDir => {}
            part => resolved.push(part),
        }
    }
    resolved
}

fn check_link(page: &Page, link: &str) -> Result<(), String> {
    let target = resolve(page, link);
    if !root().join(&target).exists() {
        return Err(format!("there is no {}", target.display()));
    }
    let Some((_, anchor)) =
        link.split_once('#').filter(|_| target.extension().is_some_and(|of| of == "md"))
    else {
        return Ok(());
    };
    let page = Page::read(target.to_str().expect("a name in UTF-8"));
    if page.anchors().iter().any(|known| known == anchor) {
        return Ok(());
    }
    Err(format!("{} has no heading for it", target.display()))
}

/// Runs commands as a reader does, with the shipped binary on the path. Each must succeed.
async fn run_in_shell(world: &World, folder: &Folder, script: &str) {
    let binary = world.command(&[]);
    let place = Path::new(binary.as_std().get_program()).parent().expect("a folder").display();
    let path = format!("{place}:{}", std::env::var("PATH").expect("a PATH"));
    let mut shell = Command::new("bash");
    shell.args(["-euo", "pipefail", "-c", script]).current_dir(folder.path());
    shell.envs(binary.as_std().get_envs().filter_map(|(name, value)| Some((name, value?))));
    shell.env("PATH", path).env_remove("PROJECTORS");
    shell.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    RunningProcess::spawn(shell).finish().await.exits(0);
}

/// A file's text, or that of all files in a folder.
fn text_of(path: &Path) -> String {
    if path.is_dir() {
        return fs::read_dir(path)
            .expect("a folder")
            .map(|file| text_of(&file.expect("a file").path()))
            .collect();
    }
    fs::read_to_string(path).expect("text")
}

/// Joins the lines of each string that a backslash continues.
fn without_line_breaks(source: &str) -> String {
    let mut lines = source.split("\\\n");
    let first = lines.next().unwrap_or_default().to_owned();
    lines.fold(first, |text, line| text + line.trim_start())
}
