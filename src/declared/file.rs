//! Parses one projector file. Each problem is reported with its line.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::command::{COMMAND_KEYS, DeclaredCommand};
use super::event_types::{check_event_type, escape_advice};
use super::handler::Handlers;
use super::projector::{DeclaredProjector, SetupStatement};
use super::revision::revision;
use super::row_by_row::FILE_REASON;
use super::{Problem, StatementError, statement};
use crate::model::projector::{EventTypes, Mode, ProjectorId};
use crate::model::spelling::nearest;

pub(super) const KEYS: [&str; 7] =
    ["name", "version", "mode", "side_effects", "setup", "teardown", "on"];
pub(super) const ON_KEYS: [&str; 3] = ["events", "sql", "batch"];
const MODES: [&str; 3] =
    [Mode::FromBeginning.as_str(), Mode::FromNow.as_str(), Mode::Once.as_str()];

/// The maximum number of `[[on]]` tables in a file.
const MAX_HANDLERS: usize = 1000;

/// A projector, and the lines of its name and version, for errors.
#[derive(Debug)]
pub(super) struct Declaration {
    pub(super) projector: DeclaredProjector,
    /// The command that applies the events. `None`: the statements of the file do.
    pub(super) command: Option<DeclaredCommand>,
    pub(super) name_line: usize,
    pub(super) version_line: usize,
}

/// Parses the text of a file. `file` is its name, for errors.
///
/// # Errors
/// All problems, in the order of their lines.
pub(super) fn parse(file: &str, text: &str) -> Result<Declaration, Vec<Problem>> {
    let mut parser = Parser { file, text, line_ends: line_ends(text), problems: Vec::new() };
    let declaration = match DeTable::parse(text) {
        Ok(table) => parser.read_declaration(table.get_ref()),
        Err(error) => {
            let at = error.span().map_or(text.len(), |span| span.start);
            let message = error.message().replace('\n', ", ");
            let advice =
                escape_advice(&message).map(|advice| format!(". {advice}")).unwrap_or_default();
            parser.report(at, format!("this is not TOML: {message}{advice}"));
            None
        }
    };
    match declaration {
        Some(declaration) if parser.problems.is_empty() => Ok(declaration),
        _ => {
            parser.problems.sort_by_key(|problem| problem.line);
            Err(parser.problems)
        }
    }
}

fn line_ends(text: &str) -> Vec<usize> {
    text.match_indices('\n').map(|(at, _)| at).collect()
}

pub(super) type Entry<'t> = Spanned<DeValue<'t>>;

pub(super) struct Parser<'f> {
    file: &'f str,
    text: &'f str,
    line_ends: Vec<usize>,
    problems: Vec<Problem>,
}

impl Parser<'_> {
    fn line(&self, at: usize) -> usize {
        1 + self.line_ends.partition_point(|end| *end < at)
    }

    fn line_of(&self, entry: Option<&Entry<'_>>) -> usize {
        self.line(entry.map_or(0, |entry| entry.span().start))
    }

    pub(super) fn report(&mut self, at: usize, reason: impl Into<String>) {
        self.problems.push(Problem::new(self.file, Some(self.line(at)), reason));
    }

    /// Reads the whole file, also after a problem, so that all problems are reported at once.
    /// `None` means that at least one was reported.
    fn read_declaration(&mut self, table: &DeTable<'_>) -> Option<Declaration> {
        let command = table.get("command");
        match command {
            Some(_) => self.check_keys(table, &[&KEYS[..], &COMMAND_KEYS].concat()),
            None => self.check_keys(table, &KEYS),
        }
        let name =
            self.require(table, "name", 0, "the projector's name, like `name = \"case_status\"`");
        let version = self.require(table, "version", 0, "`version = 1` for a new projector");
        let mode =
            self.require(table, "mode", 0, "`mode = \"from_beginning\"`, \"from_now\" or \"once\"");
        let side_effects = table
            .get("side_effects")
            .map_or(Some(false), |entry| self.read_boolean(entry, "side_effects"));
        let setup = self.read_statements(table, "setup", statement::compile_setup);
        let teardown = self.read_statements(table, "teardown", statement::compile_teardown);
        let (command, handlers) = match command {
            Some(command) => (Some(self.read_command(table, command)?), Handlers::new()),
            None => (None, self.read_handlers(table)),
        };
        let (name_line, version_line) = (self.line_of(name), self.line_of(version));
        let name = name.and_then(|entry| self.read_string(entry, "name"));
        let version = version.and_then(|entry| self.read_version(entry));
        let mode = mode.and_then(|entry| self.read_mode(entry));
        let projector = DeclaredProjector {
            revision: revision(table),
            tables: setup
                .iter()
                .filter_map(|statement: &SetupStatement| statement::created_table(&statement.sql))
                .collect(),
            id: ProjectorId { name: name?.to_owned(), version: version? },
            mode: mode?,
            side_effects: side_effects?,
            setup,
            teardown,
            handlers,
        };
        Some(Declaration { projector, command, name_line, version_line })
    }

    fn check_keys(&mut self, table: &DeTable<'_>, known: &[&str]) {
        for key in table.keys() {
            let name: &str = key.get_ref();
            if known.contains(&name) {
                continue;
            }
            let hint = if KEYS.contains(&name) {
                format!("`{name}` belongs above the first [[on]]")
            } else if ON_KEYS.contains(&name) {
                format!("`{name}` belongs in an [[on]] table")
            } else if COMMAND_KEYS.contains(&name) {
                format!("`{name}` belongs in a file with `command`")
            } else {
                let near = nearest(name, known)
                    .map(|near| format!("did you mean `{near}`? "))
                    .unwrap_or_default();
                format!("{near}the keys here are {}", known.join(", "))
            };
            self.report(key.span().start, format!("unknown key `{name}`: {hint}"));
        }
    }

    pub(super) fn require<'t, 'd>(
        &mut self,
        table: &'t DeTable<'d>,
        key: &str,
        at: usize,
        add: &str,
    ) -> Option<&'t Entry<'d>> {
        let entry = table.get(key);
        if entry.is_none() {
            self.report(at, format!("`{key}` is missing: add {add}"));
        }
        entry
    }

    pub(super) fn report_wrong_type<T>(
        &mut self,
        entry: &Entry<'_>,
        key: &str,
        expected: &str,
    ) -> Option<T> {
        let article = if matches!(entry.get_ref(), DeValue::Integer(_) | DeValue::Array(_)) {
            "an"
        } else {
            "a"
        };
        let found = entry.get_ref().type_str();
        self.report(
            entry.span().start,
            format!("`{key}` must be {expected}, and this is {article} {found}"),
        );
        None
    }

    pub(super) fn read_string<'t>(&mut self, entry: &'t Entry<'_>, key: &str) -> Option<&'t str> {
        match entry.get_ref() {
            DeValue::String(text) => Some(text),
            _ => self.report_wrong_type(entry, key, "a string in quotes"),
        }
    }

    fn read_boolean(&mut self, entry: &Entry<'_>, key: &str) -> Option<bool> {
        match entry.get_ref() {
            DeValue::Boolean(value) => Some(*value),
            _ => self.report_wrong_type(entry, key, "true or false"),
        }
    }

    pub(super) fn read_list<'t, 'd>(
        &mut self,
        entry: &'t Entry<'d>,
        key: &str,
        of: &str,
    ) -> Option<&'t [Entry<'d>]> {
        match entry.get_ref() {
            DeValue::Array(entries) => Some(entries),
            _ => self.report_wrong_type(entry, key, &format!("a list of {of}")),
        }
    }

    fn read_version(&mut self, entry: &Entry<'_>) -> Option<u32> {
        let DeValue::Integer(number) = entry.get_ref() else {
            return self.report_wrong_type(entry, "version", "a whole number, like 1");
        };
        let version = u32::from_str_radix(number.as_str(), number.radix()).ok();
        if version.is_none() {
            self.report(
                entry.span().start,
                format!("`version` must be from 1 to {}, and this is {number}", u32::MAX),
            );
        }
        version
    }

    fn read_mode(&mut self, entry: &Entry<'_>) -> Option<Mode> {
        let text = self.read_string(entry, "mode")?;
        let mode = text.parse().ok();
        if mode.is_none() {
            let near = nearest(text, &MODES)
                .map(|near| format!("did you mean \"{near}\"? "))
                .unwrap_or_default();
            self.report(
                entry.span().start,
                format!("unknown mode {text:?}: {near}it is one of {}", MODES.join(", ")),
            );
        }
        mode
    }

    fn read_statements(
        &mut self,
        table: &DeTable<'_>,
        key: &str,
        check: fn(&str) -> Result<String, StatementError>,
    ) -> Vec<SetupStatement> {
        let mut statements = Vec::new();
        let Some(entries) =
            table.get(key).and_then(|entry| self.read_list(entry, key, "SQL statements"))
        else {
            return statements;
        };
        for entry in entries {
            let Some(text) = self.read_string(entry, &format!("each entry of {key}")) else {
                continue;
            };
            match check(text) {
                Ok(sql) => statements
                    .push(SetupStatement { sql: sql.into(), origin: self.origin(&entry.span()) }),
                Err(error) => self.report_statement_error(entry, text, error),
            }
        }
        statements
    }

    fn read_handlers(&mut self, table: &DeTable<'_>) -> Handlers {
        let mut handlers = Handlers::new();
        let example = "an [[on]] table with `events` and `sql`";
        let Some(on) = self.require(table, "on", 0, example) else { return handlers };
        let DeValue::Array(tables) = on.get_ref() else {
            self.report_wrong_type::<()>(
                on,
                "on",
                "a list of tables, written [[on]] with two brackets",
            );
            return handlers;
        };
        if tables.is_empty() || tables.len() > MAX_HANDLERS {
            let count = tables.len();
            self.report(
                on.span().start,
                format!("a projector has 1 to {MAX_HANDLERS} [[on]] tables, and this has {count}"),
            );
            return handlers;
        }
        for table in tables.iter() {
            self.read_handler(table, &mut handlers);
        }
        if handlers.tables().is_none() && handlers.iter().any(|handler| handler.must_batch) {
            self.report(on.span().start, format!("`batch = true` cannot be met: {FILE_REASON}"));
        }
        handlers
    }

    fn read_handler(&mut self, entry: &Entry<'_>, handlers: &mut Handlers) {
        let DeValue::Table(table) = entry.get_ref() else {
            self.report_wrong_type::<()>(entry, "on", "a list of tables, written [[on]]");
            return;
        };
        self.check_keys(table, &ON_KEYS);
        let at = entry.span().start;
        let events = self.require(
            table,
            "events",
            at,
            "the event types, like `events = [\"Received\"]`, or [\"*\"] for all",
        );
        let events = events.and_then(|events| self.read_events(events));
        let Some(sql) =
            self.require(table, "sql", at, "the statement that is run for each of the events")
        else {
            return;
        };
        let batch = table.get("batch").and_then(|entry| self.read_boolean(entry, "batch"));
        let Some(text) = self.read_string(sql, "sql") else { return };
        match statement::compile_handler(text) {
            Ok(compiled) => {
                let origin = self.origin(&entry.span());
                let events = events.unwrap_or(EventTypes::All);
                if let Err(reason) = handlers.add(events, compiled, origin, batch) {
                    let reason = format!(
                        "`batch = true` cannot be met: {reason}. docs/projector-files.md lists the \
                         rules for many rows in one statement"
                    );
                    self.report(at, reason);
                }
            }
            Err(error) => self.report_statement_error(sql, text, error),
        }
    }

    pub(super) fn read_events(&mut self, entry: &Entry<'_>) -> Option<EventTypes> {
        let entries = self.read_list(entry, "events", "event types")?;
        if entries.is_empty() {
            self.report(
                entry.span().start,
                "an empty handler: `events` needs an event type, or \"*\" for all",
            );
            return None;
        }
        let mut types = Vec::with_capacity(entries.len());
        for event in entries {
            let Some(event_type) = self.read_string(event, "each entry of events") else {
                continue;
            };
            match check_event_type(event_type, entries.len() == 1) {
                Ok(()) => types.push(event_type.to_owned()),
                Err(reason) => self.report(event.span().start, reason),
            }
        }
        Some(if types == ["*"] { EventTypes::All } else { EventTypes::Only(types) })
    }

    fn origin(&self, span: &Range<usize>) -> String {
        format!("{}:{}", self.file, self.line(span.start))
    }

    fn report_statement_error(&mut self, entry: &Entry<'_>, text: &str, error: StatementError) {
        let span = entry.span();
        // If the string is written without escapes, its text occurs in the file, and the line is
        // that of the fault. Otherwise the line is that of the string's start.
        let written = self.text.get(span.clone()).and_then(|written| written.find(text));
        self.report(
            written.map_or(span.start, |begin| span.start + begin + error.at),
            error.reason,
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::projector::{Projector as _, SessionUse};
    use crate::testing::corrupted;

    const GOOD: &str = r#"
name = "case_status"
version = 1
mode = "from_beginning"
side_effects = false
setup = ["create table if not exists case_status (case_id varchar(64) primary key)"]
teardown = ["drop table if exists case_status"]

[[on]]
events = ["Received", "Sent"]
sql = """insert into case_status (case_id) values (:stream_id)
         on duplicate key update case_id = values(case_id);"""

[[on]]
events = ["*"]
sql = "update totals set events = events + 1"
"#;

    fn problems(text: &str) -> Vec<(usize, String)> {
        let problems = parse("a.toml", text).expect_err(text);
        problems
            .into_iter()
            .map(|problem| (problem.line.expect("a line"), problem.reason))
            .collect()
    }

    /// Replaces one part of a valid file. The file then has exactly one problem.
    fn problem_with(part: &str, replacement: &str) -> (usize, String) {
        assert!(GOOD.contains(part), "{part}");
        let mut problems = problems(&GOOD.replacen(part, replacement, 1));
        assert_eq!(problems.len(), 1, "{replacement}: {problems:?}");
        problems.remove(0)
    }

    #[test]
    fn a_file_declares_a_projector() {
        let Declaration { projector, name_line, version_line, .. } =
            parse("a.toml", GOOD).expect("it is valid");
        assert_eq!(
            (projector.name(), projector.version(), projector.mode()),
            ("case_status", 1, Mode::FromBeginning)
        );
        assert_eq!(
            (projector.has_side_effects(), projector.event_types()),
            (false, EventTypes::All)
        );
        assert_eq!((projector.setup.len(), projector.teardown.len()), (1, 1));
        assert_eq!((name_line, version_line), (2, 3));
    }

    #[test]
    fn a_revision_depends_on_the_content_and_not_on_the_formatting() {
        let revision = |text: &str| parse("a.toml", text).expect(text).projector.revision();
        let good = revision(GOOD);
        assert!(good.len() == 64);
        for same in [
            GOOD.replace('\n', "\r\n"),
            format!("# a comment\n\n{}", GOOD.replace("side_effects = false", "# none")),
            GOOD.replace(
                "version = 1\nmode = \"from_beginning\"",
                "mode = 'from_beginning'\nversion = 1 # one",
            ),
            GOOD.replace("teardown = [", "teardown = [ # at the end\n  "),
        ] {
            assert_eq!(revision(&same), good, "{same}");
        }
        for (part, other) in [
            ("from_beginning", "from_now"),
            ("side_effects = false", "side_effects = true"),
            ("varchar(64)", "varchar(65)"),
            ("drop table if exists case_status", "drop table case_status"),
            ("\"Received\", \"Sent\"", "\"Received\""),
            (":stream_id", ":event_id"),
            ("events + 1", "events + 2"),
            (
                "\n[[on]]\nevents = [\"*\"]",
                "\n[[on]]\nevents = ['*']\nsql = 'do 1'\n[[on]]\nevents = [\"*\"]",
            ),
        ] {
            assert!(GOOD.contains(part), "{part}");
            assert_ne!(revision(&GOOD.replacen(part, other, 1)), good, "{other}");
        }
    }

    #[test]
    fn the_owned_tables_and_the_session_use_are_read_from_a_file() {
        let projector = parse("a.toml", GOOD).expect("it is valid").projector;
        assert_eq!(
            (projector.tables(), projector.session()),
            (vec!["case_status".to_owned()], SessionUse::Shared)
        );
        let calling = GOOD.replace("update totals set events = events + 1", "call count_events()");
        assert_eq!(
            parse("a.toml", &calling).expect("it is valid").projector.session(),
            SessionUse::PerEvent
        );
        let counting =
            GOOD.replace("update totals set events = events + 1", "set @n = last_insert_id()");
        assert_eq!(
            parse("a.toml", &counting).expect("it is valid").projector.session(),
            SessionUse::Shared
        );
    }

    #[test]
    fn setup_teardown_and_side_effects_are_optional() {
        let text = "name = 'a'\nversion = 2\nmode = 'once'\non = [{events = ['A'], sql = 'do 1'}]";
        let projector = parse("a.toml", text).expect("it is valid").projector;
        assert!(
            projector.setup.is_empty()
                && projector.teardown.is_empty()
                && !projector.has_side_effects()
        );
        assert_eq!(
            (projector.mode(), projector.event_types()),
            (Mode::Once, EventTypes::only(["A"]))
        );
    }

    #[test]
    fn every_problem_has_its_line_and_advice() {
        for (part, replacement, line, reason) in [
            (
                "name = \"case_status\"",
                "nam = 1\nname = \"a\"",
                2,
                "unknown key `nam`: did you mean `name`?",
            ),
            (
                "name = \"case_status\"",
                "colour = 1\nname = \"a\"",
                2,
                "the keys here are name, version",
            ),
            ("name = \"case_status\"\n", "", 1, "`name` is missing: add"),
            ("version = 1\n", "", 1, "`version` is missing: add"),
            ("mode = \"from_beginning\"\n", "", 1, "`mode` is missing: add"),
            (
                "name = \"case_status\"",
                "name = 1",
                2,
                "`name` must be a string in quotes, and this is an integer",
            ),
            (
                "version = 1",
                "version = \"1\"",
                3,
                "`version` must be a whole number, like 1, and this is a string",
            ),
            ("version = 1", "version = 1.5", 3, "and this is a float"),
            ("version = 1", "version = -1", 3, "from 1 to 4294967295, and this is -1"),
            ("version = 1", "version = 4294967296", 3, "and this is 4294967296"),
            ("\"from_beginning\"", "\"from_begining\"", 4, "did you mean \"from_beginning\"?"),
            ("\"from_beginning\"", "\"later\"", 4, "one of from_beginning, from_now, once"),
            ("\"from_beginning\"", "3", 4, "`mode` must be a string"),
            ("side_effects = false", "side_effects = 0", 5, "must be true or false"),
            (
                "setup = [",
                "setup = 'drop' #",
                6,
                "`setup` must be a list of SQL statements, and this is a string",
            ),
            ("setup = [", "setup = [\n7, ", 7, "each entry of setup` must be a string"),
            ("setup = [", "setup = [\n\n'drop table a', ", 8, "`drop` is not for `setup`"),
            ("setup = [", "setup = ['''\nselect\n:position''', ", 8, "so it has no parameters"),
            ("teardown = [", "teardown = ['', ", 7, "an empty statement in `teardown`"),
            ("events = [\"Received\", \"Sent\"]", "", 9, "`events` is missing: add"),
            ("events = [\"Received\", \"Sent\"]", "events = []", 10, "an empty handler"),
            (
                "events = [\"Received\", \"Sent\"]",
                "events = 'Sent'",
                10,
                "`events` must be a list of event types",
            ),
            (
                "events = [\"Received\", \"Sent\"]",
                "events = [\n1]",
                11,
                "each entry of events` must be a string",
            ),
            ("\"Received\", \"Sent\"", "\"Sent\",\n\"*\"", 11, "write it alone"),
            ("\"Received\"", "\"$filler\"", 10, "the log's own"),
            ("\"Received\"", "\"Order*\"", 10, "there are no wildcards"),
            ("\"Received\"", "\"App\\billing\"", 10, "single quotes, like 'App\\Billing"),
            ("\"Received\"", "\"App\\Order\"", 10, "single quotes, like 'App\\Billing"),
            ("\"Received\"", "\"\"", 10, "1 to 200 characters"),
            ("\"Received\"", "\"Received \"", 10, "does not end with a space"),
            (
                "events = [\"*\"]",
                "events = [\"*\"]\nmode = 'once'",
                16,
                "belongs above the first [[on]]",
            ),
            ("events = [\"*\"]", "events = [\"*\"]\nsqll = ''", 16, "did you mean `sql`?"),
            (
                "name = \"case_status\"",
                "events = []\nname = \"a\"",
                2,
                "belongs in an [[on]] table",
            ),
            ("sql = \"update totals set events = events + 1\"", "", 14, "`sql` is missing: add"),
            ("\"update totals set events = events + 1\"", "1", 16, "`sql` must be a string"),
            ("\"update totals set events = events + 1\"", "' '", 16, "an empty handler"),
            (
                "update totals set events = events + 1",
                "create table t (a int)",
                16,
                "put it into `setup`",
            ),
            ("values(case_id)", ":case_id", 12, "unknown parameter `:case_id`"),
            ("values(case_id)", "'", 12, "never closed"),
            (
                "case_id);\"\"\"",
                "case_id);\n\n delete from a\"\"\"",
                14,
                "use several [[on]] tables",
            ),
            // An escape: the text does not occur in the file, so the line is that of the string.
            ("values(case_id)", ":case_id + '\\t'", 11, "unknown parameter `:case_id`"),
            ("events = [\"*\"]", "events = [\"*\"]\nbatch = 1", 16, "must be true or false"),
            ("events = [\"*\"]", "events = [\"*\"]\nbatch = true", 14, "it is not an insert"),
            ("version = 1", "version = ", 3, "this is not TOML: "),
            ("version = 1", "version = 1\nversion = 2", 4, "this is not TOML: duplicate key"),
            ("name = \"case_status\"", "name = \"case_status", 2, "this is not TOML: "),
        ] {
            let (found_line, found) = problem_with(part, replacement);
            assert!(found.contains(reason), "{replacement}: {found}");
            assert_eq!(found_line, line, "{replacement}: {found}");
            assert!(!found.contains('\n'), "{found}");
        }
    }

    #[test]
    fn a_file_without_handlers_or_with_too_many_is_refused() {
        let head = "name = 'a'\nversion = 1\nmode = 'once'\n";
        for (tail, line, reason) in [
            ("".to_owned(), 1, "`on` is missing: add an [[on]] table"),
            ("on = []".to_owned(), 4, "1 to 1000 [[on]] tables, and this has 0"),
            ("on = 'A'".to_owned(), 4, "written [[on]]"),
            ("on = ['A']".to_owned(), 4, "written [[on]]"),
            (
                "[on]\nevents = ['A']\nsql = 'do 1'".to_owned(),
                4,
                "[[on]] with two brackets, and this is a table",
            ),
            ("[[on]]\nevents = ['A']\nsql = 'do 1'\n".repeat(1001), 4, "and this has 1001"),
        ] {
            let found = problems(&format!("{head}{tail}"));
            assert!(
                matches!(&found[..], [(at, found)] if *at == line && found.contains(reason)),
                "{tail:.40}: {found:?}"
            );
        }
    }

    #[test]
    fn all_problems_in_a_file_are_reported_at_once_in_line_order() {
        let text = GOOD
            .replace("name =", "nome =")
            .replace("version = 1", "version = '1'")
            .replace("from_beginning", "tomorrow")
            .replace("= false", "= 0")
            .replace("if not exists", ":position")
            .replace(":stream_id", ":stream")
            .replace("[\"*\"]", "[]");
        assert_eq!(
            problems(&text).iter().map(|(line, _)| *line).collect::<Vec<_>>(),
            [1, 2, 3, 4, 5, 6, 11, 15]
        );
    }

    #[test]
    fn windows_line_ends_count_as_one() {
        let text = GOOD.replace('\n', "\r\n");
        parse("a.toml", &text).expect("it is valid");
        assert_eq!(problems(&text.replace(":stream_id", ":stream"))[0].0, 11);
    }

    #[test]
    fn toml_of_any_depth_does_not_exhaust_the_stack() {
        for deep in ["[".repeat(200_000), "{a=".repeat(200_000), "a.".repeat(200_000)] {
            for text in [format!("name = {deep}"), deep.clone(), format!("[{deep}]")] {
                assert!(parse("a.toml", &text).is_err());
            }
        }
    }

    /// [`GOOD`], with parameters of every kind.
    const BETTER: &str = r#"
name = "case_status"
version = 1
mode = "from_beginning"
setup = ["create table if not exists t (id varchar(64) primary key)"]

[[on]]
events = ["Received", "Sent"]
sql = """insert into t values (:stream_id, :payload.a."odd ""key""".0?, ':metadata') -- :x
         on duplicate key update id = :metadata, n = n + :payload.n, at = :recorded_at;"""
"#;

    proptest! {
        /// A corrupted file either declares a projector that is no larger than the file, or each
        /// problem has its line.
        #[test]
        fn a_corrupted_file_is_refused_by_line_or_a_projector_no_larger_than_itself(
            text in prop_oneof![corrupted::text(GOOD), corrupted::text(BETTER)],
        ) {
            match parse("a.toml", &text) {
                Ok(Declaration { projector, name_line, version_line, .. }) => {
                    let statements = projector.setup.iter().chain(&projector.teardown);
                    let length: usize = statements.map(|statement| statement.sql.len()).sum();
                    prop_assert!(length <= text.len());
                    prop_assert!(projector.name().len() <= text.len());
                    prop_assert!((1..=text.lines().count()).contains(&name_line.max(version_line)));
                }
                Err(problems) => {
                    prop_assert!(!problems.is_empty() && problems.len() <= text.len() + KEYS.len());
                    let lines = 1..=text.matches('\n').count() + 1;
                    let has_line = |problem: &Problem| {
                        problem.line.is_some_and(|line| lines.contains(&line))
                    };
                    prop_assert!(problems.iter().all(has_line));
                }
            }
        }
    }
}
