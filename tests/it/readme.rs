//! The README's promises: each test that it names exists.

use std::fs;
use std::path::Path;

#[test]
fn every_test_that_the_readme_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).expect("the README");
    let guarantees = readme
        .split("## What it guarantees")
        .nth(1)
        .and_then(|rest| rest.split("\nNot guaranteed:").next());
    // A few are beside the code: what needs no server.
    let tests = ["tests/it", "src"].map(|folder| text_of(&root.join(folder))).concat();
    let is_test_name =
        |code: &&str| code.len() > 15 && code.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let named: Vec<&str> = guarantees
        .expect("the section")
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(is_test_name)
        .collect();
    assert!(named.len() > 20, "the table is there: {named:?}");
    for name in named {
        assert!(tests.contains(&format!("fn {name}(")), "no test is called {name}");
    }
}

/// A file's text, or that of all files in a folder.
fn text_of(path: &Path) -> String {
    match path.is_dir() {
        true => fs::read_dir(path)
            .expect("a folder")
            .map(|file| text_of(&file.expect("a file").path()))
            .collect(),
        false => fs::read_to_string(path).expect("text"),
    }
}
