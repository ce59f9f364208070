//! The folders of `src/` are layers. A module imports from the layers below its own and from its
//! own folder, never from a layer above or beside it.

use std::fs;
use std::path::Path;

/// From the top. Folders in one row are beside each other and do not import each other.
const LAYERS: &[&[&str]] = &[
    &["command"],
    &["lambda", "telemetry"],
    &["engine"],
    &["declared"],
    &["handlers"],
    &["ledger", "queue", "store"],
    &["database"],
    &["aws"],
    &["model"],
];

/// Built for tests only, above everything.
const TEST_ONLY: [&str; 2] = ["simulation", "testing"];

/// The files at the top of `src/`.
const TOP: [&str; 2] = ["lib.rs", "main.rs"];

#[test]
fn every_folder_is_a_layer_and_imports_point_downward() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for entry in fs::read_dir(&source).expect("src") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if !path.is_dir() {
            assert!(TOP.contains(&&*name), "src/{name} belongs into one of the layers' folders");
        } else if !TEST_ONLY.contains(&&*name) {
            assert!(rank(&name).is_some(), "src/{name}/ is not a layer: add it to LAYERS");
            read(&path, &mut |file, text| found.extend(wrong_imports(&name, file, text)));
        }
    }
    assert!(found.is_empty(), "imports that do not point downward:\n{}", found.join("\n"));
}

/// A projector's handler receives a connection, and an event keeps the row that the server sent.
/// All other files of the model are free of the driver.
const MODEL_FILES_WITH_DRIVER: [&str; 2] = ["event.rs", "projector.rs"];

#[test]
fn the_model_uses_the_database_driver_only_for_rows_and_handlers() {
    let mut with_driver = Vec::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/model"), &mut |file, text| {
        if text.contains("use sqlx") || text.contains("sqlx::") {
            with_driver.extend(file.rsplit('/').next().map(str::to_owned));
        }
    });
    with_driver.sort();
    assert_eq!(with_driver, MODEL_FILES_WITH_DRIVER);
}

#[test]
fn an_import_that_points_upward_or_sideways_is_found() {
    let wrong = |folder, line: &str| wrong_imports(folder, "file.rs", line).len();
    assert_eq!(wrong("model", "use crate::engine::lag::Lag;"), 1);
    assert_eq!(wrong("store", "use crate::queue::Queue;"), 1);
    assert_eq!(wrong("engine", "    let table = crate::command::table();"), 1);
    assert_eq!(wrong("database", "use crate::{aws, engine, store};"), 2);
    assert_eq!(wrong("model", "use crate::Database;"), 1);
    assert_eq!(wrong("model", "use super::super::engine::lag::Lag;"), 1);
    assert_eq!(wrong("engine", "use crate::testing::corrupted;"), 1);
    assert_eq!(
        wrong("engine", "use crate::model::event::Event;\nuse crate::store::EventStore;"),
        0
    );
    assert_eq!(wrong("engine", "use crate::engine::apply::ApplyError;"), 0);
    assert_eq!(wrong("model", "/// See [`run`](crate::command::run)."), 0);
    assert_eq!(wrong("model", "#[cfg(test)]\nmod tests {\n    use crate::testing::corrupted;"), 0);
}

/// Calls `each` with the name and the text of every file below `folder`.
fn read(folder: &Path, each: &mut impl FnMut(&str, &str)) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            read(&path, each);
        } else {
            each(&path.display().to_string(), &fs::read_to_string(&path).expect("text"));
        }
    }
}

fn rank(folder: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&folder))
}

/// The imports of a file in `folder` that do not point downward, up to its unit tests.
fn wrong_imports(folder: &str, file: &str, text: &str) -> Vec<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let mut wrong = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let line = line.split("//").next().unwrap_or_default();
        for name in imported(line) {
            if is_below(folder, name) {
                continue;
            }
            wrong.push(format!("{file}:{}: {folder} imports {name}", number + 1));
        }
    }
    wrong
}

fn is_below(folder: &str, name: &str) -> bool {
    name == folder
        || rank(name).is_some_and(|imported| rank(folder).is_some_and(|own| imported > own))
}

/// The names directly behind `crate::` or `super::super::` in a line.
fn imported(line: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for start in ["crate::", "super::super::"] {
        for (at, _) in line.match_indices(start) {
            let before = line[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let rest = &line[at + start.len()..];
            let list =
                rest.strip_prefix('{').and_then(|rest| rest.split('}').next()).unwrap_or(rest);
            let items = if rest.starts_with('{') { list.split(',').collect() } else { vec![list] };
            let first = |item: &'_ str| {
                item.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(item.len())
            };
            names.extend(items.into_iter().map(str::trim).map(|item| &item[..first(item)]));
        }
    }
    names
}
