//! The values of a statement's parameters for one event.

use std::borrow::Cow;

use anyhow::{Context as _, bail};
use time::{Date, PrimitiveDateTime};

use super::cast::{Cast, CastValue};
use super::json::{PathId, PathValues, Paths, Value};
use super::literal;
use super::parameter::{Document, JsonParameter, Parameter};
use super::template::{Class, ParameterPlace, write_typed};
use crate::model::event::Event;

/// All paths that a projector follows in an event's documents.
#[derive(Debug)]
pub(super) struct DocumentPaths {
    payload: Paths,
    metadata: Paths,
}

/// A parameter and the source of its value.
#[derive(Debug)]
pub(super) enum Binding {
    Column(fn(&Event) -> Argument<'_>),
    Json(JsonParameter, PathId),
}

impl DocumentPaths {
    pub(super) fn new() -> Self {
        DocumentPaths { payload: Paths::new(), metadata: Paths::new() }
    }

    /// Adds the path of a parameter, if it has one.
    pub(super) fn add(&mut self, parameter: Parameter) -> Binding {
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
}

/// An event whose JSON documents are parsed at most once, and only if a statement needs a path in
/// them.
pub(super) struct Lookup<'e, 'p> {
    event: &'e Event,
    paths: &'p DocumentPaths,
    payload: Option<PathValues<'e>>,
    metadata: Option<PathValues<'e>>,
}

impl<'e, 'p> Lookup<'e, 'p> {
    pub(super) fn new(event: &'e Event, paths: &'p DocumentPaths) -> Self {
        Lookup { event, paths, payload: None, metadata: None }
    }

    /// The value of a parameter.
    ///
    /// # Errors
    /// If the value is missing or invalid.
    fn argument(&mut self, binding: &Binding) -> anyhow::Result<Argument<'e>> {
        match binding {
            Binding::Column(read) => Ok(read(self.event)),
            Binding::Json(json, place) => {
                let argument = self.json_argument(json, *place)?;
                match json.cast {
                    Some(cast) => argument.cast(cast, &json.written),
                    None => Ok(argument),
                }
            }
        }
    }

    /// The values of all parameters of a statement.
    ///
    /// # Errors
    /// If a value is missing or invalid.
    pub(super) fn arguments(&mut self, bindings: &[Binding]) -> anyhow::Result<Vec<Argument<'e>>> {
        bindings.iter().map(|binding| self.argument(binding)).collect()
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
            Document::Payload => (&self.paths.payload, &mut self.payload),
            Document::Metadata => (&self.paths.metadata, &mut self.metadata),
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

/// The value of a parameter.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Argument<'e> {
    Json(Value<'e>),
    Date(Date),
    Time(PrimitiveDateTime),
}

impl<'e> Argument<'e> {
    pub(super) fn text(text: &'e str) -> Self {
        Argument::Json(Value::Text(Cow::Borrowed(text)))
    }

    fn class(&self) -> Class {
        match self {
            Argument::Date(_) => Class::Date,
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
            Argument::Date(date) => literal::date(*date),
            Argument::Time(time) => literal::datetime(*time),
            Argument::Json(Value::Null) => "null".into(),
            Argument::Json(Value::Boolean(value)) => u8::from(*value).to_string(),
            Argument::Json(Value::Signed(number)) => number.to_string(),
            Argument::Json(Value::Unsigned(number)) => number.to_string(),
            Argument::Json(Value::Double(number)) => literal::double(*number),
            Argument::Json(Value::Text(text)) => literal::text(text),
        }
    }

    /// Appends the value as an SQL literal.
    ///
    /// # Errors
    /// If the place needs a whole number and the value is not one.
    pub(super) fn write(&self, place: ParameterPlace, text: &mut String) -> anyhow::Result<()> {
        let is_whole_number = matches!(
            self,
            Argument::Json(Value::Signed(0..) | Value::Unsigned(_) | Value::Boolean(_))
        );
        if place == ParameterPlace::Number && !is_whole_number {
            bail!(
                "the value {} stands where SQL needs a whole number from 0, for instance after \
                 `limit`",
                excerpt(&self.literal())
            );
        }
        write_typed(self.class(), place, &self.literal(), text);
        Ok(())
    }

    fn cast(self, cast: Cast, written: &str) -> anyhow::Result<Self> {
        let Argument::Json(value) = self else { return Ok(self) };
        match cast.apply(&value) {
            Ok(CastValue::Null) => Ok(Argument::Json(Value::Null)),
            Ok(CastValue::Date(date)) => Ok(Argument::Date(date)),
            Ok(CastValue::Time(time)) => Ok(Argument::Time(time)),
            Err(valid) => {
                let value = excerpt(&Argument::Json(value).literal());
                bail!("`{written}` is {value}, but must be {valid}")
            }
        }
    }
}

/// The longest value in an error, in characters.
const MAX_EXCERPT: usize = 60;

fn excerpt(literal: &str) -> String {
    match literal.char_indices().nth(MAX_EXCERPT) {
        Some((end, _)) => format!("{}…", &literal[..end]),
        None => literal.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use time::OffsetDateTime;

    use super::*;
    use crate::declared::statement;
    use crate::model::event::{Position, RecordedEvent};

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
        let mut paths = DocumentPaths::new();
        let parameters = statement::compile_handler(sql).expect(sql).parameters;
        let bindings: Vec<Binding> =
            parameters.into_iter().map(|parameter| paths.add(parameter)).collect();
        let mut lookup = Lookup::new(event, &paths);
        lookup.arguments(&bindings).map_err(|error| format!("{error:#}"))
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
    fn a_value_that_its_place_or_cast_does_not_allow_is_refused_with_an_example() {
        let event = event(r#"{"at":"yesterday","n":2.5}"#, None);
        let error = arguments("select :payload.at|datetime", &event).expect_err("no date");
        assert!(
            error.starts_with("`:payload.at|datetime` is 'yesterday', but must be a date like"),
            "{error}"
        );
        let limit = arguments("select 1 limit :payload.n", &event).expect("it exists");
        let mut text = String::new();
        let error = limit[0].write(ParameterPlace::Number, &mut text).expect_err("no whole number");
        assert!(error.to_string().contains("the value 2.5e0 stands where SQL needs"), "{error}");
        let version = Argument::Json(Value::Unsigned(3));
        version.write(ParameterPlace::Number, &mut text).expect("a whole number");
        assert_eq!(text, "3");
    }
}
