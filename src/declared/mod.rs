//! Projectors without Rust: each is a TOML file that says what to run for which events.

mod coalesce;
mod file;
mod handler;
mod insert;
mod json;
mod lexer;
mod literal;
mod parameter;
mod prepared;
mod session;
mod spelling;
mod statement;
mod tables;

use std::collections::HashMap;
use std::error::Error;
use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use self::file::Declaration;
use crate::model::projector::ProjectorId;
use crate::model::registry::{Registry, RegistryError};

const MAX_FILE_BYTES: u64 = 1024 * 1024;
const MAX_FILES: usize = 1000;
/// The problems that are told of one file; whoever mends twenty will run it again anyway.
const MAX_PROBLEMS: usize = 20;

/// Adds the projectors that the `*.toml` files of a directory declare, in the order of the files'
/// names.
///
/// Files of other names, hidden files and subdirectories are passed over. A file:
///
/// ```toml
/// name = "case_status"
/// version = 1
/// mode = "from_beginning"            # from_beginning | from_now | once
/// side_effects = false               # the default
/// setup = ["create table if not exists case_status (case_id varchar(64) primary key, amount decimal(12, 2))"]
/// teardown = ["drop table if exists case_status"]
///
/// [[on]]
/// events = ["Received", "Amended"]   # or ["*"]
/// sql = """insert into case_status (case_id, amount) values (:stream_id, :payload.order.amount?)
///          on duplicate key update amount = values(amount)"""
/// ```
///
/// Every `[[on]]` that names an event's type runs for it, in the order of the file, in the
/// transaction that also moves the projector's position. Each is one statement.
///
/// # Parameters
///
/// | parameter | binds |
/// | --- | --- |
/// | `:position`, `:stream_version` | unsigned integers |
/// | `:event_id`, `:stream_id`, `:event_type` | text |
/// | `:recorded_at` | a UTC `datetime(6)` |
/// | `:payload`, `:metadata` | the whole JSON text, byte for byte |
/// | `:payload.order.amount`, `:metadata.user` | the value that a path of keys leads to |
/// | `:payload.items.0` | a number is an index where there is an array, else a key |
/// | `:payload."odd key"` | a key other than `[A-Za-z_][A-Za-z0-9_]*` stands in double quotes; `""` in it is one `"` |
///
/// A path that leads nowhere, and any of the metadata where there is none, is the projector's
/// failure. With a `?` at its end (`:payload.order.amount?`) it is null. JSON strings bind as text,
/// integers as 64-bit integers, other numbers as doubles, booleans as 1 and 0, null as null, and an
/// object or array as its JSON text, as it was written. A number that neither type holds exactly
/// binds as its literal, so that a `decimal` or `varchar` column loses no digit. Of a key that is
/// there twice, the last counts. JSON that only the database accepts (MariaDB's `\'` and `1.`,
/// MySQL's NUL after the document) is read as the database reads it; an object or array of such a
/// document binds as JSON that is valid everywhere. To MySQL's `json` columns a bound number or
/// boolean is no JSON: write `json_extract(:payload, '$.amount')` there.
///
/// What a value does never depends on the values before it. In an expression, text behaves as
/// `'text'` does, a whole number as `cast(1 as signed)` (`unsigned` for `:position`,
/// `:stream_version` and numbers above 2^63 - 1), any other number as `1.5e0`, a time as `cast('…'
/// as datetime(6))`.
///
/// Values are bound, and no value is read as SQL. A statement whose values have had more than 16
/// combinations of types sends the others as quoted literals. Colons in literals, quoted names and
/// comments are left alone, and so are `:=` and a colon that no name follows; `::` and `?` are
/// refused. Text is read as MySQL reads it by default: `ANSI_QUOTES` and `NO_BACKSLASH_ESCAPES`
/// off. A comment that servers execute (`/*! … */`) is refused.
///
/// # Many rows in one statement
///
/// The executions of one `insert … values (…)` for consecutive events of a large batch are sent as
/// rows of one statement, where that is the same in effect. The statement is `insert [ignore]` or
/// `replace`, into a table that is not qualified with its database, of one row, perhaps with `on
/// duplicate key update`; all its parameters stand in the row; it has no variable, no subquery, and
/// no function but those that depend on their arguments alone. The table is InnoDB's, without a
/// trigger, a foreign key, an `auto_increment`, or a default or `on update` that is computed; nor,
/// for `insert ignore`, a check constraint (which a `json` column is on MariaDB); `sql_mode` is
/// strict. Rows wait for no other statement: all of them are sent before one that is no such
/// insert, and those of a table before another insert into it. In a file with `row_count()`,
/// `last_insert_id()`, `call` and their like, nothing is sent together; but what a function or a
/// trigger of yours is told by `row_count()` of the statement *before* it is not looked into.
/// Without the `trigger` privilege, granted to the user itself, triggers cannot be seen, and
/// nothing is sent together either.
///
/// # The session
///
/// Each event finds the session as if it were the first: the user variables that the file names
/// (`@total`) are null, and `last_insert_id()` and `row_count()` are 0. They live from one `[[on]]`
/// to the next of the same event. A file that names any is applied one event after the other.
///
/// A file that calls what cannot be seen through gets a transaction and a new session for each
/// event, which costs a connection each: `call`, a function that is not one of the server's,
/// `get_lock`, a sequence. A name counts as the server's if it is written without a database before
/// it and without a blank before its parenthesis.
///
/// Refused are `set` of anything but user variables, in handlers, `setup` and `teardown`; and in
/// handlers also what begins or ends a transaction, locks tables, prepares statements, or acts on
/// the server.
///
/// # Errors
/// If the directory or a file cannot be read, or a file does not hold: `FILE:LINE: reason`, of all
/// the files at once. The registry is then as it was. So it is if a name and version are taken, by
/// another file or in the registry.
pub fn load(dir: &Path, registry: &mut Registry) -> Result<(), LoadError> {
    let mut problems = Vec::new();
    let mut loader = Loader { registry: registry.clone(), origins: HashMap::new() };
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

/// Why a directory's projectors were not loaded: a line for each problem, `FILE:LINE: reason`.
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

/// What does not hold in a file, or with the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Problem {
    file: String,
    /// `None` where the file could not be read.
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

/// What does not hold in a statement, and where in its text, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct StatementError {
    at: usize,
    reason: String,
}

impl StatementError {
    fn new(at: usize, reason: impl Into<String>) -> Self {
        StatementError { at, reason: reason.into() }
    }

    /// The same in a text that begins so many bytes earlier.
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

/// The files that declare projectors, by name.
fn find_projector_files(dir: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let refuse = |reason: String| LoadError {
        problems: vec![Problem::new(&dir.display().to_string(), None, reason)],
    };
    let unreadable = |error: io::Error| {
        refuse(match error.kind() {
            io::ErrorKind::NotFound => {
                "there is no such directory: create it, or name the one with the projectors' TOML files".into()
            }
            io::ErrorKind::NotADirectory => {
                "this is not a directory: name the one that the projectors' TOML files are in".into()
            }
            io::ErrorKind::PermissionDenied => {
                "the directory cannot be read: give the user of this process the permission to".into()
            }
            _ => format!("the directory cannot be read ({error}): check it, and try again"),
        })
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        // A directory is passed over; a link to nothing is not, since somebody misses what it
        // should declare.
        if is_projector_file(&path) && !path.is_dir() {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            return Err(refuse(format!(
                "there are more than {MAX_FILES} TOML files here: spread them over several directories"
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

/// Hidden files are no projectors, as for a shell's `*.toml`: editors and Kubernetes leave some
/// about.
fn is_projector_file(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
    path.extension() == Some(OsStr::new("toml")) && !hidden
}

fn read_file(path: &Path, file: &str) -> Result<Declaration, Vec<Problem>> {
    let refuse = |line, reason: String| Err(vec![Problem::new(file, line, reason)]);
    let bytes = match read_bytes(path) {
        Ok(bytes) => bytes,
        Err(error) => {
            return refuse(
                None,
                format!("the file cannot be read ({error}): mend that, or remove it"),
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
            refuse(Some(line), "this line is not UTF-8: save the file in that encoding".into())
        }
    }
}

/// One byte more than is allowed at most, since a length that is asked for beforehand may be wrong.
fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The registry as it will be if every file holds, and which file and line declared whom.
struct Loader {
    registry: Registry,
    origins: HashMap<ProjectorId, String>,
}

impl Loader {
    fn add(&mut self, file: &str, declaration: Declaration) -> Result<(), Vec<Problem>> {
        let Declaration { projector, name_line, version_line } = declaration;
        let id = projector.id.clone();
        let (line, reason) = match self.registry.add(projector) {
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
                        "projector {id} is also declared by {other}: give one of them another name or version"
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
            "name = '{name}'\nversion = {version}\nmode = 'once'\n[[on]]\nevents = ['*']\nsql = 'do 1'\n"
        )
    }

    fn directory(files: &[(&str, &str)]) -> TempDir {
        let dir = TempDir::new().expect("a directory");
        for (name, text) in files {
            fs::write(dir.path().join(name), text).expect("a file");
        }
        dir
    }

    /// The error, without the directory in the files' names.
    fn refused(dir: &Path, registry: &mut Registry) -> String {
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
        load(dir.path(), &mut registry).expect("all hold");
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
        let error = refused(dir.path(), &mut registry);
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
                "{}/c.toml:2: projector same@2 is also declared by {place}: give one of them another name or version",
                dir.path().display()
            )
        );
        let other = directory(&[("a.toml", &projector("same", 2))]);
        load(other.path(), &mut registry).expect("it holds");
        let error = refused(other.path(), &mut registry);
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
            let error = refused(dir.path(), &mut Registry::new());
            assert!(error.starts_with(expected), "{error}");
        }
    }

    #[test]
    fn a_directory_without_projectors_is_refused_with_advice() {
        let empty = directory(&[("notes.txt", "")]);
        let file = empty.path().join("notes.txt");
        let registry = &mut Registry::new();
        assert!(
            refused(empty.path(), registry)
                .starts_with("DIR: there is no *.toml file here: add one")
        );
        assert!(
            refused(&empty.path().join("none"), registry)
                .starts_with("DIR: there is no such directory: create it")
        );
        assert!(refused(&file, registry).starts_with("DIR: this is not a directory: name the one"));
    }

    #[test]
    fn a_file_that_is_not_utf_8_is_refused_with_its_line() {
        let dir = directory(&[]);
        fs::write(dir.path().join("a.toml"), b"name = 'a'\nmode = 'caf\xe9'\n").expect("a file");
        let error = refused(dir.path(), &mut Registry::new());
        assert!(error.starts_with("a.toml:2: this line is not UTF-8"), "{error}");
    }

    #[test]
    fn a_file_that_is_too_large_or_a_dangling_link_is_refused() {
        let dir = directory(&[("a.toml", &"#".repeat(MAX_FILE_BYTES as usize + 1))]);
        std::os::unix::fs::symlink("nowhere", dir.path().join("b.toml")).expect("a link");
        let error = refused(dir.path(), &mut Registry::new());
        let lines: Vec<&str> = error.lines().collect();
        assert!(lines[0].starts_with("a.toml: the file is larger than 1048576 bytes"), "{error}");
        assert!(lines[1].starts_with("b.toml: the file cannot be read (No such file"), "{error}");
    }

    #[test]
    fn the_first_problems_in_a_file_are_listed_and_the_rest_counted() {
        let events = "''\n,".repeat(50);
        let dir = directory(&[("a.toml", &projector("a", 1).replace("'*'", &events))]);
        let error = refused(dir.path(), &mut Registry::new());
        assert_eq!(error.lines().count(), MAX_PROBLEMS);
        assert!(error.ends_with("(and 30 more problems in this file)"), "{error}");
    }
}
