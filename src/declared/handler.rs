//! The `[[on]]` tables of a file: which statements run for an event.

use std::collections::HashSet;
use std::ops::Range;

use anyhow::Context as _;

use super::argument::{Argument, Binding, DocumentPaths};
use super::coalesce::{TableIndex, Tables};
use super::insert::{self, Insert};
use super::session::{self, SessionEffects};
use super::statement::CompiledStatement;
use super::template::Template;
use crate::model::event::Event;
use crate::model::projector::EventTypes;

/// The `[[on]]` tables of a file, in its order, and the paths in their parameters.
#[derive(Debug)]
pub(super) struct Handlers {
    all: Vec<Handler>,
    pub(super) paths: DocumentPaths,
    /// The tables of the inserts that may be coalesced.
    tables: Tables,
    /// Whether a statement may read how earlier statements were sent. Then none is coalesced.
    prevents_coalescing: bool,
    /// What the statements leave behind in their session.
    session_effects: SessionEffects,
    /// The statements that reset the session state before each event.
    reset: Vec<String>,
}

impl Handlers {
    pub(super) fn new() -> Self {
        Handlers {
            all: Vec::new(),
            paths: DocumentPaths::new(),
            tables: Tables::default(),
            prevents_coalescing: false,
            session_effects: SessionEffects::default(),
            reset: Vec::new(),
        }
    }

    /// Adds a handler after the others. `batch` is the key of that name.
    ///
    /// # Errors
    /// With `batch = true`, the reason why the statement cannot be sent for many events at once.
    pub(super) fn add(
        &mut self,
        events: EventTypes,
        statement: CompiledStatement,
        origin: String,
        batch: Option<bool>,
    ) -> Result<(), &'static str> {
        let event_types = match events {
            EventTypes::All => None,
            EventTypes::Only(types) => Some(types.into_iter().collect()),
        };
        let must_batch = batch == Some(true);
        let insert = match insert::parse(&statement.sql) {
            Err(reason) if must_batch => return Err(reason),
            Ok(insert) if batch != Some(false) => {
                let table = self.tables.add(&insert);
                Some((insert, table))
            }
            _ => None,
        };
        self.session_effects.add(session::analyze(&statement.sql));
        self.reset = self.session_effects.reset_statements();
        self.prevents_coalescing |= insert::reads_previous_result(&statement.sql)
            || !self.reset.is_empty()
            || self.session_effects.is_opaque;
        let template = Template::new(statement.sql);
        let parameters = statement.parameters.into_iter();
        let bindings = parameters.map(|parameter| self.paths.add(parameter)).collect();
        self.all.push(Handler { event_types, template, bindings, insert, must_batch, origin });
        Ok(())
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Handler> {
        self.all.iter()
    }

    /// The handlers that match an event.
    pub(super) fn matching(&self, event: &Event) -> impl Iterator<Item = &Handler> {
        self.all.iter().filter(|handler| handler.matches(event))
    }

    /// The tables whose inserts may be coalesced; `None` if coalescing is prevented.
    pub(super) fn tables(&self) -> Option<&Tables> {
        Some(&self.tables).filter(|_| !self.prevents_coalescing)
    }

    /// The statements to run before each event. Without them, a variable would hold the value of
    /// the previous event in a batch, and null for an event that is applied alone.
    pub(super) fn reset_statements(&self) -> &[String] {
        &self.reset
    }

    /// Whether a statement may leave anything in its session, or return several results.
    pub(super) fn is_opaque(&self) -> bool {
        self.session_effects.is_opaque
    }

    /// The most statements that one event runs.
    pub(super) fn max_statements_per_event(&self) -> usize {
        let types: HashSet<&str> = self
            .all
            .iter()
            .filter_map(|handler| handler.event_types.as_ref())
            .flatten()
            .map(String::as_str)
            .collect();
        let count = |matches: &dyn Fn(&HashSet<String>) -> bool| {
            self.all
                .iter()
                .filter(|handler| handler.event_types.as_ref().is_none_or(matches))
                .count()
        };
        let of_any = count(&|_| false);
        types.iter().map(|name| count(&|types| types.contains(*name))).fold(of_any, usize::max)
    }

    pub(super) fn event_types(&self) -> EventTypes {
        let mut union = HashSet::new();
        for handler in &self.all {
            match &handler.event_types {
                None => return EventTypes::All,
                Some(types) => union.extend(types.iter().cloned()),
            }
        }
        EventTypes::only(union)
    }
}

#[derive(Debug)]
pub(super) struct Handler {
    /// `None` means every event.
    event_types: Option<HashSet<String>>,
    template: Template,
    pub(super) bindings: Vec<Binding>,
    /// The statement as an insert that may be coalesced, as far as its text shows.
    insert: Option<(Insert, TableIndex)>,
    /// Whether the file demands that the insert is sent for many events at once.
    pub(super) must_batch: bool,
    /// `FILE:LINE`, for errors.
    pub(super) origin: String,
}

impl Handler {
    fn matches(&self, event: &Event) -> bool {
        self.event_types.as_ref().is_none_or(|types| types.contains(event.event_type()))
    }

    pub(super) fn coalescable_insert(&self) -> Option<(&Insert, TableIndex)> {
        self.insert.as_ref().map(|(insert, table)| (insert, *table))
    }

    /// Appends the statement with these arguments to `text`.
    ///
    /// # Errors
    /// If an argument is not allowed in its place.
    pub(super) fn write(
        &self,
        arguments: &[Argument<'_>],
        text: &mut String,
    ) -> anyhow::Result<()> {
        self.write_part(0..self.template.sql().len(), arguments, text)
    }

    /// Appends the statement's text before its row to `text`.
    pub(super) fn write_head(&self, insert: &Insert, text: &mut String) {
        text.push_str(&self.template.sql()[..insert.row.start]);
    }

    /// Appends a row with these arguments to `text`.
    ///
    /// # Errors
    /// If an argument is not allowed in its place.
    pub(super) fn write_row(
        &self,
        insert: &Insert,
        arguments: &[Argument<'_>],
        text: &mut String,
    ) -> anyhow::Result<()> {
        self.write_part(insert.row.clone(), arguments, text)
    }

    /// Appends the statement's text after its row to `text`.
    pub(super) fn write_tail(&self, insert: &Insert, text: &mut String) {
        text.push_str(&self.template.sql()[insert.row.end..]);
    }

    fn write_part(
        &self,
        part: Range<usize>,
        arguments: &[Argument<'_>],
        text: &mut String,
    ) -> anyhow::Result<()> {
        self.template
            .render(part, text, |index, place, text| arguments[index].write(place, text))
            .with_context(|| self.origin.clone())
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::super::argument::Lookup;
    use super::*;
    use crate::declared::statement;
    use crate::model::event::{Position, RecordedEvent};
    use crate::testing::hot_path;

    #[test]
    fn hot_path_render() {
        let insert = "insert into cases (id, version, at, amount, org_group, user) values \
                      (:stream_id, :stream_version, :recorded_at, :payload.amount, \
                      :payload.org.group, :metadata.user?)";
        let mut handlers = Handlers::new();
        handlers
            .add(
                EventTypes::All,
                statement::compile_handler(insert).expect("it compiles"),
                "a.toml:1".into(),
                None,
            )
            .expect("no batch is demanded");
        let events = hot_path::events();
        let text = hot_path::count(|| {
            let mut text = String::new();
            for event in &events {
                let mut lookup = Lookup::new(event, &handlers.paths);
                for handler in handlers.matching(event) {
                    let (insert, _) = handler.coalescable_insert().expect("an insert");
                    let arguments = lookup.arguments(&handler.bindings).expect("all paths exist");
                    handler.write_row(insert, &arguments, &mut text).expect("the values fit");
                }
            }
            text
        });
        assert_eq!(text.matches('(').count(), events.len() * 3, "a row, and the cast of its time");
    }

    #[test]
    fn each_statement_gets_its_event_types_and_the_projector_their_union() {
        let statement = || statement::compile_handler("select 1").expect("it compiles");
        let mut handlers = Handlers::new();
        let add = |handlers: &mut Handlers, events| {
            handlers.add(events, statement(), "a.toml:1".into(), None).expect("no batch")
        };
        add(&mut handlers, EventTypes::only(["Received", "Sent"]));
        add(&mut handlers, EventTypes::only(["Sent"]));
        let EventTypes::Only(mut types) = handlers.event_types() else {
            panic!("no handler has `*`")
        };
        types.sort();
        assert_eq!(types, ["Received", "Sent"]);

        add(&mut handlers, EventTypes::All);
        assert_eq!(handlers.event_types(), EventTypes::All);
        let event = Event::from(RecordedEvent {
            position: Position::new(7),
            event_id: "e-7".into(),
            stream_id: "case-1".into(),
            stream_version: 3,
            event_type: "Received".into(),
            recorded_at: OffsetDateTime::UNIX_EPOCH,
            payload: "{}".into(),
            metadata: None,
        });
        let seen: Vec<bool> = handlers.all.iter().map(|handler| handler.matches(&event)).collect();
        assert_eq!(seen, [true, false, true]);
    }

    #[test]
    fn the_statements_of_an_event_are_counted_for_the_busiest_type() {
        let statement = || statement::compile_handler("select 1").expect("it compiles");
        let mut handlers = Handlers::new();
        for events in [
            EventTypes::All,
            EventTypes::only(["A", "B"]),
            EventTypes::only(["B"]),
            EventTypes::only(["C"]),
        ] {
            handlers.add(events, statement(), "a.toml:1".into(), None).expect("no batch");
        }
        assert_eq!(handlers.max_statements_per_event(), 3);
    }
}
