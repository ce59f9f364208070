//! The keys of a projector file that names a command instead of SQL.

use std::collections::BTreeMap;
use std::path::PathBuf;

use toml::de::{DeTable, DeValue};

use super::file::{Entry, Parser};
use crate::handlers::CommandSpec;
use crate::model::external::Delivery;
use crate::model::projector::EventTypes;
use crate::model::spelling::nearest;

/// The keys that only a file with a command has. `revision` covers the first ones: they say what is
/// applied, the others how the process is run.
pub(super) const COMMAND_KEYS: [&str; 8] = [
    "command",
    "events",
    "delivery",
    "tables",
    "revision",
    "directory",
    "environment",
    "pass_environment",
];
pub(super) const DEFINING_KEYS: usize = 5;

/// What a file with a command says about its process.
#[derive(Debug)]
pub(super) struct DeclaredCommand {
    pub(super) event_types: EventTypes,
    pub(super) tables: Vec<String>,
    pub(super) delivery: Delivery,
    pub(super) spec: CommandSpec,
}

impl Parser<'_> {
    /// Reads the keys of a command. `None` means that at least one problem was reported.
    pub(super) fn read_command(
        &mut self,
        table: &DeTable<'_>,
        command: &Entry<'_>,
    ) -> Option<DeclaredCommand> {
        if let Some(on) = table.get("on") {
            self.report(
                on.span().start,
                "a file has either `command` or [[on]] tables: with a command, the process applies \
                 the events",
            );
        }
        let arguments = self.read_strings(command, "command");
        if arguments.as_ref().is_some_and(|arguments| {
            arguments.first().is_none_or(|program| program.trim().is_empty())
        }) {
            self.report(
                command.span().start,
                "`command` needs a program, like `command = [\"php\", \"projector.php\"]`",
            );
        }
        let events = self.require(
            table,
            "events",
            command.span().start,
            "the event types, like `events = [\"Received\"]`, or [\"*\"] for all",
        );
        let event_types = events.and_then(|events| self.read_events(events));
        let delivery = table
            .get("delivery")
            .map_or(Some(Delivery::ExactlyOnce), |entry| self.read_delivery(entry));
        let mut list = |key| table.get(key).map_or(Some(Vec::new()), |e| self.read_strings(e, key));
        let (tables, pass_environment) = (list("tables"), list("pass_environment"));
        let directory = match table.get("directory") {
            Some(entry) => Some(PathBuf::from(self.read_string(entry, "directory")?)),
            None => None,
        };
        if let Some(revision) = table.get("revision") {
            self.read_string(revision, "revision")?;
        }
        let environment = table
            .get("environment")
            .map_or(Some(BTreeMap::new()), |entry| self.read_environment(entry));
        Some(DeclaredCommand {
            event_types: event_types?,
            tables: tables?,
            delivery: delivery?,
            spec: CommandSpec {
                command: arguments?,
                directory,
                environment: environment?,
                pass_environment: pass_environment?,
            },
        })
    }

    fn read_delivery(&mut self, entry: &Entry<'_>) -> Option<Delivery> {
        let text = self.read_string(entry, "delivery")?;
        let found = Delivery::ALL.into_iter().find(|delivery| delivery.as_str() == text);
        if found.is_none() {
            let known = Delivery::ALL.map(Delivery::as_str);
            let near = nearest(text, &known)
                .map(|near| format!("did you mean \"{near}\"? "))
                .unwrap_or_default();
            self.report(
                entry.span().start,
                format!("unknown delivery {text:?}: {near}it is one of {}", known.join(", ")),
            );
        }
        found
    }

    fn read_strings(&mut self, entry: &Entry<'_>, key: &str) -> Option<Vec<String>> {
        let entries = self.read_list(entry, key, "strings")?;
        let mut strings = Vec::with_capacity(entries.len());
        for entry in entries {
            let text = self.read_string(entry, &format!("each entry of {key}"))?;
            if text.contains('\0') {
                self.report(entry.span().start, format!("an entry of `{key}` has a NUL"));
                return None;
            }
            strings.push(text.to_owned());
        }
        Some(strings)
    }

    fn read_environment(&mut self, entry: &Entry<'_>) -> Option<BTreeMap<String, String>> {
        let DeValue::Table(table) = entry.get_ref() else {
            return self.report_wrong_type(entry, "environment", "a table of strings");
        };
        let mut environment = BTreeMap::new();
        for (name, value) in table.iter() {
            let text = self.read_string(value, &format!("environment.{}", name.get_ref()))?;
            let name: &str = name.get_ref();
            if name.is_empty() || name.contains(['=', '\0']) || text.contains('\0') {
                self.report(value.span().start, format!("{name:?} cannot be a variable"));
                return None;
            }
            environment.insert(name.to_owned(), text.to_owned());
        }
        Some(environment)
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::parse;
    use super::*;
    use crate::model::projector::Projector as _;

    const GOOD: &str = r#"
name = "orders"
version = 1
mode = "from_beginning"
events = ["OrderPaid", "OrderPlaced"]
command = ["php", "orders.php"]
tables = ["orders"]
revision = "3"
directory = "/srv/app"
environment = { APP_ENV = "prod" }
pass_environment = ["DATABASE_DSN"]
"#;

    fn problem_with(part: &str, replacement: &str) -> (usize, String) {
        assert!(GOOD.contains(part), "{part}");
        let text = GOOD.replacen(part, replacement, 1);
        let mut problems = parse("a.toml", &text).expect_err(&text);
        assert_eq!(problems.len(), 1, "{problems:?}");
        let problem = problems.remove(0);
        (problem.line.expect("a line"), problem.reason)
    }

    #[test]
    fn a_file_names_a_command_and_how_it_is_run() {
        let command = parse("a.toml", GOOD).expect("it is valid").command.expect("a command");
        assert_eq!(command.event_types, EventTypes::only(["OrderPaid", "OrderPlaced"]));
        assert_eq!(command.tables, ["orders"]);
        assert_eq!(command.delivery, Delivery::ExactlyOnce);
        assert_eq!(
            command.spec,
            CommandSpec {
                command: vec!["php".into(), "orders.php".into()],
                directory: Some("/srv/app".into()),
                environment: BTreeMap::from([("APP_ENV".into(), "prod".into())]),
                pass_environment: vec!["DATABASE_DSN".into()],
            }
        );
    }

    #[test]
    fn a_revision_covers_the_events_and_the_command_and_not_how_it_is_run() {
        let revision = |text: &str| parse("a.toml", text).expect(text).projector.revision();
        for (part, other) in [("/srv/app", "/app"), ("prod", "test"), ("DATABASE_DSN", "DSN")] {
            assert_eq!(revision(&GOOD.replacen(part, other, 1)), revision(GOOD), "{other}");
        }
        for (part, other) in [
            ("orders.php", "order.php"),
            ("\"OrderPaid\", ", ""),
            ("\"3\"", "\"4\""),
            ("tables = [\"orders\"]", ""),
            ("tables", "delivery = \"at_least_once\"\ntables"),
        ] {
            assert_ne!(revision(&GOOD.replacen(part, other, 1)), revision(GOOD), "{other}");
        }
    }

    #[test]
    fn each_wrong_key_of_a_command_is_reported_with_its_line() {
        for (part, replacement, line, reason) in [
            ("[\"php\", \"orders.php\"]", "\"php\"", 6, "must be a list"),
            ("[\"php\", \"orders.php\"]", "[]", 6, "`command` needs a program"),
            ("[\"php\", \"orders.php\"]", "[1]", 6, "each entry of command"),
            ("events = [\"OrderPaid\", \"OrderPlaced\"]\n", "", 5, "`events` is missing"),
            ("revision", "delivery = \"exactly_onec\"\nrevision", 8, "did you mean"),
            ("revision", "revison", 8, "did you mean `revision`?"),
            ("revision = \"3\"", "revision = 3", 8, "`revision` must be a string"),
            ("\"prod\"", "1", 10, "`environment.APP_ENV` must be a string"),
            ("APP_ENV", "\"A=B\"", 10, "cannot be a variable"),
            ("revision", "on = []\nrevision", 8, "either `command` or [[on]]"),
        ] {
            let (found, because) = problem_with(part, replacement);
            assert!(found == line && because.contains(reason), "{replacement}: {found}: {because}");
        }
    }
}
