//! Projectors without Rust. Each is a TOML file with the SQL statements to run for its events.

mod argument;
mod cast;
mod coalesce;
mod command;
mod event_types;
mod file;
mod handler;
mod insert;
mod json;
mod lexer;
mod literal;
mod packet;
mod parameter;
mod projector;
mod revision;
mod row_by_row;
mod session;
mod statement;
mod tables;
mod template;

use std::collections::HashMap;
use std::error::Error;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use self::command::DeclaredCommand;
use self::file::Declaration;
use self::projector::DeclaredProjector;
use crate::handlers::{CommandProjector, Processes};
use crate::model::projector::ProjectorId;
use crate::model::registry::{Registry, RegistryError};

const MAX_FILE_BYTES: u64 = 1024 * 1024;
const MAX_FILES: usize = 1000;
/// The maximum number of problems listed for one file. Further problems are only counted.
const MAX_PROBLEMS: usize = 20;

/// Adds the projectors that the `*.toml` files of a directory declare, in the order of the files'
/// names.
///
/// Files with other names, hidden files and subdirectories are ignored. A file looks like this:
///
/// ```toml
/// name = "case_status"
/// version = 1
/// mode = "from_beginning"            # from_beginning | from_now | once
/// side_effects = false               # the default
/// setup = ["""create table if not exists case_status
///             (case_id varchar(64) primary key, amount decimal(12, 2))"""]
/// teardown = ["drop table if exists case_status"]
///
/// [[on]]
/// events = ["Received", "Amended"]   # or ["*"]
/// sql = """insert into case_status (case_id, amount) values (:stream_id, :payload.order.amount?)
///          on duplicate key update amount = values(amount)"""
/// ```
///
/// Each `[[on]]` holds one statement. Every `[[on]]` that lists an event's type runs for that
/// event, in the order of the file. The statements run in the transaction that also moves the
/// projector's position.
///
/// # Parameters
///
/// | parameter | binds |
/// | --- | --- |
/// | `:position`, `:stream_version` | an unsigned integer |
/// | `:event_id`, `:stream_id`, `:event_type` | text |
/// | `:recorded_at` | a `datetime(6)` in UTC |
/// | `:payload`, `:metadata` | the whole JSON text, byte for byte |
/// | `:payload.order.amount`, `:metadata.user` | the value at a path of keys |
/// | `:payload.items.0` | a number is an index in an array, and a key elsewhere |
/// | `:payload."odd key"` | a quoted key; needed for keys other than `[A-Za-z_][A-Za-z0-9_]*` |
/// | `:payload.order.amount?` | the value at the path, or null if the path is missing |
/// | `:payload.at\|datetime` | an ISO 8601 date as a `datetime(6)` in UTC |
/// | `:payload.at\|date` | the date of that time in UTC |
/// | `:payload.at\|unix_seconds` | seconds since 1970 as a `datetime(6)` in UTC |
/// | `:payload.at\|unix_milliseconds` | milliseconds since 1970 as a `datetime(6)` in UTC |
///
/// In a quoted key, `""` stands for one `"`. If a key occurs twice in an object, the last one
/// counts. A path without `?` that is missing breaks the projector. So does a parameter
/// `:metadata…` without `?` for an event without metadata.
///
/// | JSON value | binds as |
/// | --- | --- |
/// | string | text |
/// | integer | a 64-bit integer |
/// | other number | a double |
/// | number that neither type holds exactly | its literal text |
/// | `true`, `false` | 1, 0 |
/// | `null` | null |
/// | object, array | its JSON text, as it was written |
///
/// A `decimal` or `varchar` column stores a literal text without losing a digit. JSON that only the
/// database accepts (MariaDB's `\'` and `1.`, MySQL's NUL after the document) is read as the
/// database reads it. An object or array of such a document binds as JSON that is valid everywhere.
/// MySQL's `json` columns do not accept a bound number or boolean as JSON: write
/// `json_extract(:payload, '$.amount')` there.
///
/// A value's effect never depends on the values of earlier events. In an expression, text behaves
/// as `'text'`, a whole number as `cast(1 as signed)` (`unsigned` for `:position`,
/// `:stream_version` and numbers above 2^63 - 1), any other number as `1.5e0`, and a time as
/// `cast('…' as datetime(6))`.
///
/// A value takes the place of its parameter as a literal, quoted and escaped. No value is read as
/// SQL. The statements of a batch are sent as text, many in one packet, and nothing is prepared.
///
/// Colons in literals, quoted names and comments are left alone, and so are `:=` and a colon that
/// no name follows. `::` and `?` are refused. The text is read as MySQL reads it by default, with
/// `ANSI_QUOTES` and `NO_BACKSLASH_ESCAPES` off. A comment that servers execute (`/*! … */`) is
/// refused.
///
/// # Many rows in one statement
///
/// In a large batch, consecutive executions of one `insert … values (…)` become one statement with
/// many rows, if the effect is the same. These are the conditions:
///
/// - The statement is `insert`, `insert ignore` or `replace`, with one row and perhaps with
///   `on duplicate key update`. The table is not qualified with its database.
/// - All parameters are in the row. The statement has no variable and no subquery. The result of
///   each function depends on its arguments alone.
/// - The table is an InnoDB table. It has no trigger, no foreign key, no `auto_increment` column,
///   and no computed default or `on update`.
/// - For `insert ignore`, the table has no check constraint. On MariaDB, a `json` column has one.
/// - `sql_mode` is strict.
/// - The file uses no `row_count()`, `last_insert_id()`, `call` or similar.
/// - The `[[on]]` does not have `batch = false`.
///
/// With `batch = true` in the `[[on]]`, the file or its setup fails unless all of this is true.
///
/// Rows are sent before any other statement runs, and before another `[[on]]` inserts into the same
/// table. One case is not checked: a function or a trigger of yours that reads `row_count()` of the
/// statement *before* it.
///
/// Triggers are visible only to a user with the `trigger` privilege, granted to the user itself.
/// Without it, inserts are sent one by one.
///
/// # The session
///
/// Each event finds the session as if it were the first event. The user variables that the file
/// names (`@total`) are null, and `last_insert_id()` and `row_count()` are 0. They keep their
/// values from one `[[on]]` to the next for the same event. A file that names any of them is
/// applied one event after the other.
///
/// `call`, a function that is not the server's own, `get_lock` and a sequence can leave anything
/// behind in a session. A file that uses one of them gets a transaction and a new session for each
/// event, which costs one connection an event. A name counts as the server's own if no database is
/// written before it and its parenthesis follows without a blank.
///
/// Handlers, `setup` and `teardown` may set only user variables. Handlers also refuse statements
/// that begin or end a transaction, lock tables, prepare statements, or act on the server.
///
/// # Errors
/// If the directory or a file cannot be read, or a file is invalid. The error lists the problems of
/// all files as `FILE:LINE: reason`. A name and version that another file or the registry already
/// has is such a problem. After an error the registry is unchanged.
pub fn load(dir: &Path, registry: &mut Registry) -> Result<(), LoadError> {
    let mut problems = Vec::new();
    let mut loader = Loader {
        registry: registry.clone(),
        origins: HashMap::new(),
        processes: Processes::default(),
    };
    for path in find_projector_files(dir)? {
        let file = path.display().to_string();
        let added = read_file(&path, &file).and_then(|declaration| loader.add(&file, declaration));
        if let Err(found) = added {
            problems.extend(truncate_problems(MAX_PROBLEMS, found));
        }
    }
    if !problems.is_empty() {
        return Err(LoadError { problems });
    }
    *registry = loader.registry;
    Ok(())
}

/// The problems because of which a directory was not loaded, one a line: `FILE:LINE: reason`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadError {
    problems: Vec<Problem>,
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

impl Error for LoadError {}

/// A problem in a file or with the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Problem {
    file: String,
    /// `None` if the problem concerns the whole file or directory.
    line: Option<usize>,
    reason: String,
}

impl Problem {
    fn new(file: &str, line: Option<usize>, reason: impl Into<String>) -> Self {
        Problem { file: file.to_owned(), line, reason: reason.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}:{line}: {}", self.file, self.reason),
            None => write!(f, "{}: {}", self.file, self.reason),
        }
    }
}

/// A problem in a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
struct StatementError {
    /// The offset in the statement's text, in bytes.
    at: usize,
    reason: String,
}

impl StatementError {
    fn new(at: usize, reason: impl Into<String>) -> Self {
        StatementError { at, reason: reason.into() }
    }

    /// Moves the problem by `bytes`, for a text that contains the statement at that offset.
    fn offset_by(self, bytes: usize) -> Self {
        StatementError { at: self.at + bytes, ..self }
    }
}

fn truncate_problems(limit: usize, mut problems: Vec<Problem>) -> Vec<Problem> {
    let more = problems.len().saturating_sub(limit);
    problems.truncate(limit);
    if let Some(last) = problems.last_mut().filter(|_| more > 0) {
        last.reason.push_str(&format!(" (and {more} more problems in this file)"));
    }
    problems
}

/// The projector files of a directory, sorted by name.
fn find_projector_files(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let refuse = |reason: String| LoadError {
        problems: vec![Problem::new(&dir.display().to_string(), None, reason)],
    };
    let unreadable = |error: io::Error| {
        refuse(match error.kind() {
            io::ErrorKind::NotFound => {
                "there is no such directory: create it, or name the directory of the projectors' \
                 TOML files"
                    .into()
            }
            io::ErrorKind::NotADirectory => {
                "this is not a directory: name the directory of the projectors' TOML files".into()
            }
            io::ErrorKind::PermissionDenied => {
                "the directory cannot be read: give the user of this process read permission".into()
            }
            _ => {
                format!("the directory cannot be read ({error}): correct the cause, and try again")
            }
        })
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        // A directory is ignored. A dangling link is kept: reading it then fails, so that a missing
        // projector is noticed.
        if is_projector_file(&path) && !path.is_dir() {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            return Err(refuse(format!(
                "there are more than {MAX_FILES} TOML files here: spread them over several \
                 directories"
            )));
        }
    }
    if files.is_empty() {
        return Err(refuse(
            "there is no *.toml file here: add one for each projector, or name another directory"
                .into(),
        ));
    }
    files.sort_unstable();
    Ok(files)
}

/// Whether the name is that of a projector file. Hidden files are ignored, as by a shell's
/// `*.toml`: editors and Kubernetes create some.
fn is_projector_file(path: &Path) -> bool {
    let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    path.extension() == Some(OsStr::new("toml")) && !is_hidden
}

fn read_file(path: &Path, file: &str) -> Result<Declaration, Vec<Problem>> {
    let refuse = |line, reason: String| Err(vec![Problem::new(file, line, reason)]);
    let bytes = match read_bytes(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            return refuse(
                None,
                format!("the file cannot be read ({error}): correct the cause, or remove the file"),
            );
        }
    };
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return refuse(
            None,
            format!(
                "the file is larger than {MAX_FILE_BYTES} bytes: split it into several projectors"
            ),
        );
    }
    match str::from_utf8(&bytes) {
        Ok(text) => file::parse(file, text),
        Err(error) => {
            let line =
                1 + bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count();
            refuse(Some(line), "this line is not UTF-8: save the file as UTF-8".into())
        }
    }
}

/// Reads a file, but at most one byte more than is allowed. The size is not taken from the file's
/// metadata, which may be wrong.
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The registry with the projectors of the files so far, and the `FILE:LINE` that declared each.
struct Loader {
    registry: Registry,
    origins: HashMap<ProjectorId, String>,
    processes: Processes,
}

impl Loader {
    fn register(
        &mut self,
        projector: DeclaredProjector,
        command: Option<DeclaredCommand>,
    ) -> Result<(), RegistryError> {
        let Some(command) = command else { return self.registry.add(projector) };
        let DeclaredCommand { event_types, tables, delivery, spec } = command;
        let projector = CommandProjector::new(
            projector,
            event_types,
            tables,
            delivery,
            spec,
            &mut self.processes,
        );
        let external = projector.external();
        self.registry.add_external(projector, external)
    }

    fn add(&mut self, file: &str, declaration: Declaration) -> Result<(), Vec<Problem>> {
        let Declaration { projector, command, name_line, version_line } = declaration;
        let id = projector.id.clone();
        let (line, reason) = match self.register(projector, command) {
            Ok(()) => {
                self.origins.insert(id, format!("{file}:{name_line}"));
                return Ok(());
            }
            Err(error @ RegistryError::InvalidName(_)) => (name_line, error.to_string()),
            Err(error @ RegistryError::InvalidVersion(_)) => (version_line, error.to_string()),
            Err(RegistryError::Duplicate(id)) => {
                let other = self.origins.get(&id).map_or("the program itself", String::as_str);
                (
                    name_line,
                    format!(
                        "projector {id} is also declared by {other}: give one of them another \
                         name or version"
                    ),
                )
            }
        };
        Err(vec![Problem::new(file, Some(line), reason)])
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    fn projector(name: &str, version: u32) -> String {
        format!(
            "name = '{name}'\nversion = {version}\nmode = 'once'\n\
             [[on]]\nevents = ['*']\nsql = 'do 1'\n"
        )
    }

    fn directory(files: &[(&str, &str)]) -> TempDir {
        let dir = TempDir::new().expect("a directory");
        for (name, text) in files {
            fs::write(dir.path().join(name), text).expect("a file");
        }
        dir
    }

    /// The error, with paths relative to the directory.
    fn load_error(dir: &Path, registry: &mut Registry) -> String {
        let error = load(dir, registry).expect_err("it is refused").to_string();
        error.replace(&format!("{}/", dir.display()), "").replace(&dir.display().to_string(), "DIR")
    }

    #[test]
    fn projectors_are_registered_in_file_name_order() {
        let dir = directory(&[
            ("b.toml", &projector("first", 1)),
            ("c.toml", &projector("second", 1)),
            ("a.toml", &projector("zeroth", 1)),
            ("README.md", "not TOML"),
            (".hidden.toml", "not TOML"),
            ("d.toml~", "not TOML"),
        ]);
        fs::create_dir(dir.path().join("more.toml")).expect("a directory");
        let mut registry = Registry::new();
        load(dir.path(), &mut registry).expect("all are valid");
        let names: Vec<&str> =
            registry.iter().map(|registered| registered.id.name.as_str()).collect();
        assert_eq!(names, ["zeroth", "first", "second"]);
    }

    #[test]
    fn one_bad_file_prevents_registration_and_every_bad_file_is_named() {
        let dir = directory(&[
            ("a.toml", &projector("good", 1)),
            ("b.toml", "name = 1\nversion = 1\nmode = 'once'\n[[on]]\nevents = []\nsql = 'do 1'"),
            ("c.toml", "nonsense"),
        ]);
        let mut registry = Registry::new();
        let error = load_error(dir.path(), &mut registry);
        let places: Vec<&str> = error.lines().filter_map(|line| line.split(": ").next()).collect();
        assert_eq!(places, ["b.toml:1", "b.toml:5", "c.toml:1"], "{error}");
        assert!(registry.is_empty());
    }

    #[test]
    fn a_name_and_version_declared_twice_are_refused_with_both_places() {
        let dir = directory(&[
            ("a.toml", &projector("same", 2)),
            ("b.toml", &projector("same", 1)),
            ("c.toml", &format!("# a comment\n{}", projector("same", 2))),
        ]);
        let mut registry = Registry::new();
        let place = format!("{}/a.toml:1", dir.path().display());
        assert_eq!(
            load(dir.path(), &mut registry).expect_err("it is refused").to_string(),
            format!(
                "{}/c.toml:2: projector same@2 is also declared by {place}: \
                 give one of them another name or version",
                dir.path().display()
            )
        );
        let other = directory(&[("a.toml", &projector("same", 2))]);
        load(other.path(), &mut registry).expect("it is valid");
        let error = load_error(other.path(), &mut registry);
        assert!(
            error.starts_with("a.toml:1: projector same@2 is also declared by the program itself"),
            "{error}"
        );
        assert_eq!(registry.len(), 1);
    }

    #[test]
    fn names_and_versions_follow_the_registrys_rules() {
        let long = "a".repeat(101);
        for (name, version, expected) in [
            ("a b", 1, "a.toml:1: projector name \"a b\" must be 1 to 100"),
            ("", 1, "a.toml:1: projector name \"\" must be"),
            (long.as_str(), 1, "a.toml:1: projector name"),
            ("a", 0, "a.toml:2: projector a: the version must be at least 1"),
        ] {
            let dir = directory(&[("a.toml", &projector(name, version))]);
            let error = load_error(dir.path(), &mut Registry::new());
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_directory_without_projectors_is_refused_with_advice() {
        let empty = directory(&[("notes.txt", "")]);
        let file = empty.path().join("notes.txt");
        let registry = &mut Registry::new();
        assert!(
            load_error(empty.path(), registry)
                .starts_with("DIR: there is no *.toml file here: add one")
        );
        assert!(
            load_error(&empty.path().join("none"), registry)
                .starts_with("DIR: there is no such directory: create it")
        );
        assert!(
            load_error(&file, registry)
                .starts_with("DIR: this is not a directory: name the directory")
        );
    }

    #[test]
    fn a_file_that_is_not_utf_8_is_refused_with_its_line() {
        let dir = directory(&[]);
        fs::write(dir.path().join("a.toml"), b"name = 'a'\nmode = 'caf\xe9'\n").expect("a file");
        let error = load_error(dir.path(), &mut Registry::new());
        assert!(error.starts_with("a.toml:2: this line is not UTF-8"), "{error}");
    }

    #[test]
    fn a_file_that_is_too_large_or_a_dangling_link_is_refused() {
        let dir = directory(&[("a.toml", &"#".repeat(MAX_FILE_BYTES as usize + 1))]);
        std::os::unix::fs::symlink("nowhere", dir.path().join("b.toml")).expect("a link");
        let error = load_error(dir.path(), &mut Registry::new());
        let lines: Vec<&str> = error.lines().collect();
        assert!(lines[0].starts_with("a.toml: the file is larger than 1048576 bytes"), "{error}");
        assert!(lines[1].starts_with("b.toml: the file cannot be read (No such file"), "{error}");
    }

    #[test]
    fn the_first_problems_in_a_file_are_listed_and_the_rest_counted() {
        let events = "''\n,".repeat(50);
        let dir = directory(&[("a.toml", &projector("a", 1).replace("'*'", &events))]);
        let error = load_error(dir.path(), &mut Registry::new());
        assert_eq!(error.lines().count(), MAX_PROBLEMS);
        assert!(error.ends_with("(and 30 more problems in this file)"), "{error}");
    }
}
