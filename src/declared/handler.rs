//! Runs a declared projector: for each event, the statements of the handlers that match it.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use sqlx::error::BoxDynError;
use sqlx::mysql::MySqlArguments;
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, MySql, MySqlConnection};
use time::PrimitiveDateTime;

use super::coalesce::{self, TableIndex, Tables};
use super::insert::{self, Insert};
use super::json::{PathId, PathValues, Paths, Value};
use super::literal;
use super::parameter::{Document, JsonParameter, Parameter};
use super::prepared::{Class, ExecutionMode, ParameterPlace, PreparedStatement, write_typed};
use super::session::{self, SessionEffects};
use super::statement::CompiledStatement;
use crate::database::multi_row::Rows;
use crate::model::event::Event;
use crate::model::projector::{EventTypes, Mode, Projector, ProjectorId, SessionUse};

/// A projector that a file declares.
#[derive(Debug)]
pub(super) struct DeclaredProjector {
    pub(super) id: ProjectorId,
    pub(super) mode: Mode,
    pub(super) side_effects: bool,
    pub(super) setup: Vec<SetupStatement>,
    pub(super) teardown: Vec<SetupStatement>,
    pub(super) handlers: Handlers,
    /// The SHA-256 of the file's content.
    pub(super) revision: String,
    /// The tables that `setup` creates.
    pub(super) tables: Vec<String>,
}

#[async_trait]
impl Projector for DeclaredProjector {
    fn name(&self) -> &str {
        &self.id.name
    }

    fn version(&self) -> u32 {
        self.id.version
    }

    fn mode(&self) -> Mode {
        self.mode
    }

    fn event_types(&self) -> EventTypes {
        self.handlers.event_types()
    }

    fn has_side_effects(&self) -> bool {
        self.side_effects
    }

    fn revision(&self) -> String {
        self.revision.clone()
    }

    fn tables(&self) -> Vec<String> {
        self.tables.clone()
    }

    fn session(&self) -> SessionUse {
        if self.handlers.session_effects.is_opaque {
            SessionUse::PerEvent
        } else {
            SessionUse::Shared
        }
    }

    async fn setup(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        run_statements(&self.setup, db).await
    }

    async fn teardown(&self, db: &mut MySqlConnection) -> anyhow::Result<()> {
        run_statements(&self.teardown, db).await
    }

    async fn handle(&self, event: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        self.handlers.apply(event, db).await
    }

    async fn handle_batch(
        &self,
        events: &[&Event],
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        coalesce::apply(&self.id, &self.handlers, events, db).await
    }
}

/// A statement of setup or teardown.
#[derive(Debug)]
pub(super) struct SetupStatement {
    pub(super) sql: Arc<str>,
    /// `FILE:LINE`, for errors.
    pub(super) origin: String,
}

/// Sends each statement as text, because some DDL cannot be prepared.
async fn run_statements(
    statements: &[SetupStatement],
    db: &mut MySqlConnection,
) -> anyhow::Result<()> {
    for statement in statements {
        let query = sqlx::raw_sql(AssertSqlSafe(Arc::clone(&statement.sql)));
        query.execute(&mut *db).await.with_context(|| statement.origin.clone())?;
    }
    Ok(())
}

/// The `[[on]]` tables of a file, in its order, and the paths in their parameters.
#[derive(Debug)]
pub(super) struct Handlers {
    all: Vec<Handler>,
    payload: Paths,
    metadata: Paths,
    /// The tables of the inserts that may be coalesced.
    tables: Tables,
    /// Whether a statement may read how earlier statements were sent. Then none is coalesced.
    prevents_coalescing: bool,
    /// What the statements leave behind in their session.
    session_effects: SessionEffects,
    /// The SQL that resets the session state before each event; `None` if the statements read none.
    reset_sql: Option<Arc<str>>,
}

impl Handlers {
    pub(super) fn new() -> Self {
        let (payload, metadata) = (Paths::new(), Paths::new());
        Handlers {
            all: Vec::new(),
            payload,
            metadata,
            tables: Tables::default(),
            prevents_coalescing: false,
            session_effects: SessionEffects::default(),
            reset_sql: None,
        }
    }

    /// Adds a handler after the others.
    pub(super) fn add(&mut self, events: EventTypes, statement: CompiledStatement, origin: String) {
        let event_types = match events {
            EventTypes::All => None,
            EventTypes::Only(types) => Some(types.into_iter().collect()),
        };
        let insert = insert::parse(&statement.sql).ok().map(|insert| {
            let table = self.tables.add(&insert);
            (insert, table)
        });
        self.session_effects.add(session::analyze(&statement.sql));
        self.reset_sql = self.session_effects.reset_sql().map(Arc::from);
        self.prevents_coalescing |= insert::reads_previous_result(&statement.sql)
            || self.reset_sql.is_some()
            || self.session_effects.is_opaque;
        let prepared = PreparedStatement::new(statement.sql);
        let bindings =
            statement.parameters.into_iter().map(|parameter| self.binding(parameter)).collect();
        self.all.push(Handler { event_types, statement: prepared, bindings, insert, origin });
    }

    /// The handlers that match an event.
    pub(super) fn matching(&self, event: &Event) -> impl Iterator<Item = &Handler> {
        self.all.iter().filter(|handler| handler.matches(event))
    }

    /// The tables whose inserts may be coalesced; `None` if coalescing is prevented.
    pub(super) fn tables(&self) -> Option<&Tables> {
        Some(&self.tables).filter(|_| !self.prevents_coalescing)
    }

    /// Applies one event. Each statement is sent by itself.
    pub(super) async fn apply(
        &self,
        event: &Event,
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        if let Some(reset) = &self.reset_sql {
            // Without the reset, a variable would hold the value of the previous event in a batch,
            // and null for an event that is applied alone.
            sqlx::raw_sql(AssertSqlSafe(Arc::clone(reset))).execute(&mut *db).await?;
        }
        let mut lookup = Lookup::new(event, self);
        for handler in self.matching(event) {
            let arguments =
                handler.arguments(&mut lookup).with_context(|| handler.origin.clone())?;
            handler.execute(arguments, db).await?;
        }
        Ok(())
    }

    fn binding(&mut self, parameter: Parameter) -> Binding {
        Binding::Column(match parameter {
            Parameter::Position => |event| Argument::Json(Value::Unsigned(event.position().get())),
            Parameter::EventId => |event| Argument::text(event.event_id()),
            Parameter::StreamId => |event| Argument::text(event.stream_id()),
            Parameter::StreamVersion => {
                |event| Argument::Json(Value::Unsigned(event.stream_version()))
            }
            Parameter::EventType => |event| Argument::text(event.event_type()),
            Parameter::RecordedAt => |event| Argument::Time(event.recorded_at_utc()),
            Parameter::Json(json) => {
                let paths = match json.document {
                    Document::Payload => &mut self.payload,
                    Document::Metadata => &mut self.metadata,
                };
                let place = paths.add(&json.path);
                return Binding::Json(json, place);
            }
        })
    }

    fn event_types(&self) -> EventTypes {
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
    statement: PreparedStatement,
    bindings: Vec<Binding>,
    /// The statement as an insert that may be coalesced, as far as its text shows.
    insert: Option<(Insert, TableIndex)>,
    /// `FILE:LINE`, for errors.
    pub(super) origin: String,
}

/// A parameter and the source of its value.
#[derive(Debug)]
enum Binding {
    Column(fn(&Event) -> Argument<'_>),
    Json(JsonParameter, PathId),
}

impl Handler {
    fn matches(&self, event: &Event) -> bool {
        self.event_types.as_ref().is_none_or(|types| types.contains(event.event_type()))
    }

    pub(super) fn coalescable_insert(&self) -> Option<(&Insert, TableIndex)> {
        self.insert.as_ref().map(|(insert, table)| (insert, *table))
    }

    pub(super) fn arguments<'e>(
        &self,
        event: &mut Lookup<'e, '_>,
    ) -> anyhow::Result<Vec<Argument<'e>>> {
        self.bindings
            .iter()
            .map(|binding| match binding {
                Binding::Column(read) => Ok(read(event.event)),
                Binding::Json(json, place) => event.json_argument(json, *place),
            })
            .collect()
    }

    /// How to send arguments of these types: alone, or as one of many rows.
    pub(super) fn execution_mode(&self, arguments: &[Argument<'_>], many: bool) -> ExecutionMode {
        self.statement.execution_mode(arguments.iter().map(Argument::class), many)
    }

    /// The statement's text before and after a row.
    pub(super) fn split_at_row(&self, row: &Range<usize>) -> (&str, &str) {
        let sql = self.statement.sql();
        (&sql[..row.start], &sql[row.end..])
    }

    /// A part of the statement with literals in place of its parameters. The part contains all
    /// parameters.
    pub(super) fn with_literals(&self, arguments: &[Argument<'_>], part: Range<usize>) -> String {
        self.statement.with_literals(part, |index, place, text| {
            let argument = &arguments[index];
            write_typed(argument.class(), place, &argument.literal(), text);
        })
    }

    /// The arguments to bind. A null in an expression is not bound: it is part of the text.
    fn bound_arguments<'e>(
        &self,
        arguments: Vec<Argument<'e>>,
    ) -> impl Iterator<Item = Argument<'e>> {
        let is_bound = |(argument, place): &(Argument<'e>, ParameterPlace)| {
            argument.class() != Class::Null || *place != ParameterPlace::Expression
        };
        arguments
            .into_iter()
            .zip(self.statement.places())
            .filter(is_bound)
            .map(|(argument, _)| argument)
    }

    /// Adds the arguments as a row of a statement with many rows.
    pub(super) fn bind_to_row(
        &self,
        arguments: Vec<Argument<'_>>,
        rows: &mut Rows,
    ) -> anyhow::Result<()> {
        rows.begin_row();
        for argument in self.bound_arguments(arguments) {
            argument
                .bind_to_row(rows)
                .map_err(sqlx::Error::Encode)
                .with_context(|| self.origin.clone())?;
        }
        Ok(())
    }

    pub(super) async fn execute(
        &self,
        arguments: Vec<Argument<'_>>,
        db: &mut MySqlConnection,
    ) -> anyhow::Result<()> {
        let executed = match self.execution_mode(&arguments, false) {
            ExecutionMode::Prepared(text) => {
                let query = sqlx::query(AssertSqlSafe(Arc::clone(&text.sql)));
                self.bound_arguments(arguments)
                    .fold(query, |query, argument| argument.bind_to(query))
                    .execute(db)
                    .await
            }
            ExecutionMode::Literal => {
                let sql = self.with_literals(&arguments, 0..self.statement.sql().len());
                sqlx::raw_sql(AssertSqlSafe(sql)).execute(db).await
            }
        };
        executed.map(|_| ()).with_context(|| self.origin.clone())
    }
}

/// An event whose JSON documents are parsed at most once, and only if a statement needs a path in
/// them.
pub(super) struct Lookup<'e, 'h> {
    event: &'e Event,
    handlers: &'h Handlers,
    payload: Option<PathValues<'e>>,
    metadata: Option<PathValues<'e>>,
}

impl<'e, 'h> Lookup<'e, 'h> {
    pub(super) fn new(event: &'e Event, handlers: &'h Handlers) -> Self {
        Lookup { event, handlers, payload: None, metadata: None }
    }

    fn json_argument(
        &mut self,
        parameter: &JsonParameter,
        place: PathId,
    ) -> anyhow::Result<Argument<'e>> {
        let name = parameter.document.name();
        let found = match self.document_text(parameter.document) {
            Some(text) if parameter.path.is_empty() => return Ok(Argument::text(text)),
            Some(text) => self
                .find_path(parameter.document, text, place)
                .with_context(|| format!("the {name} is not JSON"))?,
            None => None,
        };
        let written = &parameter.written;
        match found {
            Some(text) => Value::parse(text)
                .map(Argument::Json)
                .with_context(|| format!("`{written}` cannot be read")),
            None if parameter.is_optional => Ok(Argument::Json(Value::Null)),
            None if self.document_text(parameter.document).is_none() => {
                bail!(
                    "`{written}`: the event has no {name}; write `{written}?` to bind null for \
                     such events"
                )
            }
            None => bail!(
                "`{written}` is missing in the event's {name}; write `{written}?` to bind null if \
                 it is missing"
            ),
        }
    }

    fn document_text(&self, document: Document) -> Option<&'e str> {
        match document {
            Document::Payload => Some(self.event.payload_text()),
            Document::Metadata => self.event.metadata_text(),
        }
    }

    fn find_path(
        &mut self,
        document: Document,
        text: &'e str,
        place: PathId,
    ) -> Result<Option<&'e str>, serde_json::Error> {
        let (paths, found) = match document {
            Document::Payload => (&self.handlers.payload, &mut self.payload),
            Document::Metadata => (&self.handlers.metadata, &mut self.metadata),
        };
        let found = match found {
            Some(found) => found,
            none => none.insert(paths.find(text).or_else(|error| {
                let strict = match document {
                    Document::Payload => self.event.strict_payload(),
                    Document::Metadata => self.event.strict_metadata(),
                };
                strict.map_or(Err(error), |text| paths.find(text))
            })?),
        };
        Ok(found.get(place))
    }
}

/// A value to bind to one `?`.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Argument<'e> {
    Json(Value<'e>),
    Time(PrimitiveDateTime),
}

impl<'e> Argument<'e> {
    fn text(text: &'e str) -> Self {
        Argument::Json(Value::Text(Cow::Borrowed(text)))
    }

    fn class(&self) -> Class {
        match self {
            Argument::Time(_) => Class::Time,
            Argument::Json(Value::Null) => Class::Null,
            Argument::Json(Value::Boolean(_) | Value::Signed(_)) => Class::Signed,
            Argument::Json(Value::Unsigned(_)) => Class::Unsigned,
            Argument::Json(Value::Double(_)) => Class::Double,
            Argument::Json(Value::Text(_)) => Class::Text,
        }
    }

    /// The value as an SQL literal of the same type.
    fn literal(&self) -> String {
        match self {
            Argument::Time(time) => literal::datetime(*time),
            Argument::Json(Value::Null) => "null".into(),
            Argument::Json(Value::Boolean(value)) => u8::from(*value).to_string(),
            Argument::Json(Value::Signed(number)) => number.to_string(),
            Argument::Json(Value::Unsigned(number)) => number.to_string(),
            Argument::Json(Value::Double(number)) => literal::double(*number),
            Argument::Json(Value::Text(text)) => literal::text(text),
        }
    }

    fn bind_to<'q>(
        self,
        query: Query<'q, MySql, MySqlArguments>,
    ) -> Query<'q, MySql, MySqlArguments> {
        match self {
            Argument::Time(time) => query.bind(time),
            Argument::Json(Value::Null) => query.bind(None::<&str>),
            // A `bool` would be sent as an unsigned number. MySQL fails if a subtraction with an
            // unsigned number has a negative result.
            Argument::Json(Value::Boolean(value)) => query.bind(i64::from(value)),
            Argument::Json(Value::Signed(number)) => query.bind(number),
            Argument::Json(Value::Unsigned(number)) => query.bind(number),
            Argument::Json(Value::Double(number)) => query.bind(number),
            Argument::Json(Value::Text(text)) => query.bind(text),
        }
    }

    /// Binds the value in a row of a statement with many rows.
    fn bind_to_row(self, rows: &mut Rows) -> Result<(), BoxDynError> {
        match self {
            Argument::Time(time) => rows.bind(time),
            Argument::Json(Value::Null) => rows.bind(None::<&str>),
            Argument::Json(Value::Boolean(value)) => rows.bind(i64::from(value)),
            Argument::Json(Value::Signed(number)) => rows.bind(number),
            Argument::Json(Value::Unsigned(number)) => rows.bind(number),
            Argument::Json(Value::Double(number)) => rows.bind(number),
            Argument::Json(Value::Text(text)) => rows.bind(text),
        }
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;
    use crate::declared::statement;
    use crate::model::event::{Position, RecordedEvent};
    use crate::testing::hot_path;

    fn event(payload: &str, metadata: Option<&str>) -> Event {
        Event::from(RecordedEvent {
            position: Position::new(7),
            event_id: "e-7".into(),
            stream_id: "case-1".into(),
            stream_version: 3,
            event_type: "Received".into(),
            recorded_at: OffsetDateTime::UNIX_EPOCH,
            payload: payload.into(),
            metadata: metadata.map(Into::into),
        })
    }

    fn arguments<'e>(sql: &str, event: &'e Event) -> Result<Vec<Argument<'e>>, String> {
        let mut handlers = Handlers::new();
        handlers.add(
            EventTypes::All,
            statement::compile_handler(sql).expect(sql),
            "a.toml:1".into(),
        );
        let mut lookup = Lookup::new(event, &handlers);
        handlers.all[0].arguments(&mut lookup).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn the_columns_of_an_event_bind_as_their_types() {
        let event = event(r#"{ "a": 1 }"#, Some("[]"));
        let bound = arguments(
            "values (:position, :event_id, :stream_id, :stream_version, :event_type, :recorded_at,
                     :payload, :metadata)",
            &event,
        );
        let expected = [
            Argument::Json(Value::Unsigned(7)),
            Argument::text("e-7"),
            Argument::text("case-1"),
            Argument::Json(Value::Unsigned(3)),
            Argument::text("Received"),
            Argument::Time(event.recorded_at_utc()),
            Argument::text(r#"{ "a": 1 }"#),
            Argument::text("[]"),
        ];
        assert_eq!(bound.as_deref(), Ok(&expected[..]));
    }

    #[test]
    fn a_missing_path_is_null_if_optional_and_an_error_otherwise() {
        for (payload, metadata, parameter, expected) in [
            (r#"{"a":1}"#, None, ":payload.a", Ok(Value::Signed(1))),
            (r#"{"a":1}"#, None, ":payload.a?", Ok(Value::Signed(1))),
            (r#"{"a":null}"#, None, ":payload.a", Ok(Value::Null)),
            ("{}", None, ":payload.a?", Ok(Value::Null)),
            (r#"{"a":1}"#, None, ":payload.a.b?", Ok(Value::Null)),
            (r#"{"a":null}"#, None, ":payload.a.b?", Ok(Value::Null)),
            ("5", None, ":payload.a?", Ok(Value::Null)),
            ("{}", None, ":payload?", Ok(Value::Text("{}".into()))),
            ("null", None, ":payload", Ok(Value::Text("null".into()))),
            ("{}", None, ":metadata?", Ok(Value::Null)),
            ("{}", None, ":metadata.a?", Ok(Value::Null)),
            ("{}", Some("null"), ":metadata.a?", Ok(Value::Null)),
            ("{}", Some(r#"{"a":true}"#), ":metadata.a", Ok(Value::Boolean(true))),
            (
                "{}",
                None,
                ":payload.a",
                Err("`:payload.a` is missing in the event's payload; write `:payload.a?`"),
            ),
            (
                r#"{"a":1}"#,
                None,
                ":payload.a.b",
                Err("`:payload.a.b` is missing in the event's payload"),
            ),
            (
                "{}",
                None,
                ":metadata",
                Err("`:metadata`: the event has no metadata; write `:metadata?`"),
            ),
            ("{}", None, ":metadata.a", Err("`:metadata.a`: the event has no metadata")),
            (
                "{}",
                Some("null"),
                ":metadata.a",
                Err("`:metadata.a` is missing in the event's metadata"),
            ),
            ("{", None, ":payload.a?", Err("the payload is not JSON")),
            (r#"{"a":"\ud800"}"#, None, ":payload.a", Err("`:payload.a` cannot be read")),
        ] {
            let event = event(payload, metadata);
            let bound = arguments(&format!("select {parameter}"), &event);
            match expected {
                Ok(value) => {
                    assert_eq!(bound, Ok(vec![Argument::Json(value)]), "{parameter} of {payload}")
                }
                Err(reason) => {
                    let error = bound.expect_err(parameter);
                    assert!(error.starts_with(reason), "{parameter} of {payload}: {error}");
                }
            }
        }
    }

    #[test]
    fn a_payload_is_decoded_only_if_a_statement_uses_a_path() {
        let event = event("not JSON", None);
        assert_eq!(
            arguments("values (:payload, :position)", &event).map(|bound| bound.len()),
            Ok(2)
        );
    }

    #[test]
    fn hot_path_bind() {
        let insert = "insert into cases (id, version, at, amount, org_group, user) values \
                      (:stream_id, :stream_version, :recorded_at, :payload.amount, \
                      :payload.org.group, :metadata.user?)";
        let mut handlers = Handlers::new();
        handlers.add(
            EventTypes::All,
            statement::compile_handler(insert).expect("it compiles"),
            "a.toml:1".into(),
        );
        let events = hot_path::events();
        let bound = hot_path::count(|| {
            let mut rows = Rows::default();
            for event in &events {
                let mut lookup = Lookup::new(event, &handlers);
                for handler in handlers.matching(event) {
                    let arguments = handler.arguments(&mut lookup).expect("all paths exist");
                    handler.execution_mode(&arguments, true);
                    handler
                        .bind_to_row(arguments, &mut rows)
                        .expect("the arguments can be encoded");
                }
            }
            rows.arguments(0..events.len()).expect("the rows were encoded")
        });
        assert_eq!(sqlx::Arguments::len(&bound), events.len() * 6);
    }

    #[test]
    fn each_statement_gets_its_event_types_and_the_projector_their_union() {
        let statement = || statement::compile_handler("select 1").expect("it compiles");
        let mut handlers = Handlers::new();
        handlers.add(EventTypes::only(["Received", "Sent"]), statement(), "a.toml:1".into());
        handlers.add(EventTypes::only(["Sent"]), statement(), "a.toml:4".into());
        let EventTypes::Only(mut types) = handlers.event_types() else {
            panic!("no handler has `*`")
        };
        types.sort();
        assert_eq!(types, ["Received", "Sent"]);

        handlers.add(EventTypes::All, statement(), "a.toml:7".into());
        assert_eq!(handlers.event_types(), EventTypes::All);
        let event = event("{}", None);
        let seen: Vec<bool> = handlers.all.iter().map(|handler| handler.matches(&event)).collect();
        assert_eq!(seen, [true, false, true]);
    }
}
