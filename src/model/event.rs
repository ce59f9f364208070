//! Events and their positions in the one global order.

use std::collections::HashSet;
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sqlx::mysql::MySqlRow;
use sqlx::{Decode, MySql, Row, Type};
use time::{OffsetDateTime, PrimitiveDateTime, UtcOffset};

use crate::model::server_json;

/// The event type of a gap filler: a row in a position whose transaction was rolled back.
///
/// Types that begin with `$` belong to the log itself: [`NewEvent::check`] refuses them.
pub const FILLER: &str = "$filler";

/// An event's place in the one global order of the log: `events.position`.
///
/// Positions start at 1 and have no gaps below the high-water mark. [`Position::START`] (0) is
/// before the first event.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Position(u64);

impl Position {
    /// The position before the first event.
    pub const START: Position = Position(0);

    /// The position with this number.
    pub const fn new(number: u64) -> Self {
        Position(number)
    }

    /// The number, as the database stores it.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The position after this one.
    pub const fn next(self) -> Self {
        Position(self.0.saturating_add(1))
    }

    /// The position before this one. [`Position::START`] returns itself.
    pub const fn previous(self) -> Self {
        Position(self.0.saturating_sub(1))
    }

    /// How many positions are above `earlier` and at or below this one.
    pub const fn since(self, earlier: Position) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One row of the log.
///
/// Its fields are decoded when a projector reads them, because most projectors use few events and
/// few fields of each.
pub struct Event {
    position: Position,
    /// Decoded at once, because every projector asks for it.
    is_filler: bool,
    /// Set when a projector reads a field that cannot be decoded.
    has_decode_error: AtomicBool,
    fields: Fields,
    /// Payload and metadata rewritten for serde_json, if the server accepts them as JSON and
    /// serde_json does not. Created when they are first needed.
    strict_json: OnceLock<Box<StrictJson>>,
}

/// JSON texts that [`server_json::to_strict`] has changed.
#[derive(Default)]
struct StrictJson {
    payload: Option<String>,
    metadata: Option<String>,
}

/// The source of an event's fields.
enum Fields {
    /// The row that the server sent.
    Row(MySqlRow),
    Owned(Box<RecordedEvent>),
}

/// The columns of the log's table, in its order.
enum Column {
    Position,
    EventId,
    StreamId,
    StreamVersion,
    EventType,
    RecordedAt,
    Payload,
    Metadata,
}

impl Event {
    /// The event in a row of the log, whose columns are in the order of the log's table. Decodes
    /// the position, and whether the event is a gap filler. The other fields are decoded when they
    /// are read, or all together by [`Event::check`].
    ///
    /// # Errors
    /// If the position or the event type is missing or has another type.
    pub(crate) fn from_row(row: MySqlRow) -> Result<Self, sqlx::Error> {
        Ok(Event {
            position: Position::new(row.try_get(Column::Position as usize)?),
            is_filler: row.try_get_unchecked::<&[u8], _>(Column::EventType as usize)?
                == FILLER.as_bytes(),
            has_decode_error: AtomicBool::new(false),
            fields: Fields::Row(row),
            strict_json: OnceLock::new(),
        })
    }

    /// Decodes every field.
    ///
    /// # Errors
    /// If a field is missing or has another type.
    pub(crate) fn check(&self) -> Result<(), sqlx::Error> {
        let Fields::Row(row) = &self.fields else { return Ok(()) };
        // By name, so that the error names the column.
        for column in ["event_id", "stream_id", "event_type", "payload"] {
            row.try_get::<&str, _>(column)?;
        }
        row.try_get::<Option<&str>, _>("metadata")?;
        row.try_get::<u64, _>("stream_version").map(|_| ())
    }

    /// The error of a field that was read and could not be decoded; `None` if every read succeeded.
    /// The accessor returned a default value, so the handler's result must be discarded.
    pub(crate) fn decode_error(&self) -> Option<sqlx::Error> {
        self.has_decode_error.load(Ordering::Relaxed).then(|| self.check().err()).flatten()
    }

    /// Whether the event's type is one of these. Returns `true` if the type cannot be decoded: the
    /// event must not be skipped, and [`Event::decode_error`] reports it.
    pub(crate) fn may_match(&self, types: &HashSet<String>) -> bool {
        match self.event_type() {
            "" => self.has_decode_error.load(Ordering::Relaxed),
            event_type => types.contains(event_type),
        }
    }

    /// The event's place in the global order.
    pub fn position(&self) -> Position {
        self.position
    }

    /// The id, unique in the whole log. Use it as the idempotency key for effects outside the
    /// database.
    pub fn event_id(&self) -> &str {
        self.field(Column::EventId, |recorded| recorded.event_id.as_str())
    }

    /// The stream: the aggregate that the event belongs to.
    pub fn stream_id(&self) -> &str {
        self.field(Column::StreamId, |recorded| recorded.stream_id.as_str())
    }

    /// The event's place in its stream, counted from 1.
    pub fn stream_version(&self) -> u64 {
        self.field(Column::StreamVersion, |recorded| recorded.stream_version)
    }

    /// The type: what happened. Projectors subscribe to types.
    pub fn event_type(&self) -> &str {
        self.field(Column::EventType, |recorded| recorded.event_type.as_str())
    }

    /// The time of the event, in UTC, to the microsecond.
    ///
    /// To bind it to a statement, use [`Event::recorded_at_utc`]. An [`OffsetDateTime`] is bound as
    /// a `timestamp`, which MariaDB stores as null before 1970 and from 2038-01-19T03:14:08Z on.
    pub fn recorded_at(&self) -> OffsetDateTime {
        match &self.fields {
            Fields::Row(row) => decode_recorded_at(row, Column::RecordedAt as usize),
            Fields::Owned(recorded) => recorded.recorded_at,
        }
    }

    /// The time of the event, in UTC, to the microsecond, as a `datetime` column stores it. Bind
    /// this value to statements.
    pub fn recorded_at_utc(&self) -> PrimitiveDateTime {
        utc_datetime(self.recorded_at())
    }

    /// The payload's JSON text, byte for byte as it was appended.
    pub fn payload_text(&self) -> &str {
        self.field(Column::Payload, |recorded| recorded.payload.as_str())
    }

    /// The metadata's JSON text; `None` if the event has no metadata.
    pub fn metadata_text(&self) -> Option<&str> {
        self.field(Column::Metadata, |recorded| recorded.metadata.as_deref())
    }

    /// Decodes the payload. JSON that the database accepts and serde_json does not (MariaDB's
    /// `\\'`, `1.`; MySQL's NUL after the document) is read as the database reads it.
    ///
    /// # Errors
    /// If the JSON does not have the shape of `T`. If a handler returns this error, the projector
    /// breaks at this event.
    pub fn payload<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        let read = serde_json::from_str(self.payload_text());
        read.or_else(|error| self.strict_payload().map_or(Err(error), serde_json::from_str))
    }

    /// Decodes the metadata. Missing metadata is decoded as `null`, so `T` may be an `Option`.
    ///
    /// # Errors
    /// If the JSON does not have the shape of `T`.
    pub fn metadata<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        let read = serde_json::from_str(self.metadata_text().unwrap_or("null"));
        read.or_else(|error| self.strict_metadata().map_or(Err(error), serde_json::from_str))
    }

    /// The payload, rewritten after serde_json has refused it; `None` if there is nothing to
    /// rewrite.
    pub(crate) fn strict_payload(&self) -> Option<&str> {
        self.strict_json().payload.as_deref()
    }

    /// The metadata, rewritten after serde_json has refused it; `None` if there is nothing to
    /// rewrite.
    pub(crate) fn strict_metadata(&self) -> Option<&str> {
        self.strict_json().metadata.as_deref()
    }

    fn strict_json(&self) -> &StrictJson {
        self.strict_json.get_or_init(|| {
            let payload = server_json::to_strict(self.payload_text());
            Box::new(StrictJson {
                payload,
                metadata: self.metadata_text().and_then(server_json::to_strict),
            })
        })
    }

    /// Whether this row is a gap filler. Fillers advance projectors, but no handler receives them.
    pub fn is_filler(&self) -> bool {
        self.is_filler
    }

    /// The size of payload and metadata together, in bytes. Decodes neither.
    pub(crate) fn json_bytes(&self) -> usize {
        match &self.fields {
            Fields::Row(row) => {
                let bytes = |column: Column| {
                    row.try_get_unchecked::<Option<&[u8]>, _>(column as usize).ok().flatten()
                };
                bytes(Column::Payload).map_or(0, <[u8]>::len)
                    + bytes(Column::Metadata).map_or(0, <[u8]>::len)
            }
            Fields::Owned(recorded) => {
                recorded.payload.len() + recorded.metadata.as_ref().map_or(0, String::len)
            }
        }
    }

    /// A field of the row or of the owned event. Returns the default value and sets
    /// `has_decode_error` if the row's field cannot be decoded.
    fn field<'e, T>(&'e self, column: Column, get: impl FnOnce(&'e RecordedEvent) -> T) -> T
    where
        T: Decode<'e, MySql> + Type<MySql> + Default,
    {
        match &self.fields {
            Fields::Row(row) => row.try_get(column as usize).unwrap_or_else(|_| {
                self.has_decode_error.store(true, Ordering::Relaxed);
                T::default()
            }),
            Fields::Owned(recorded) => get(recorded),
        }
    }

    /// All fields, by name.
    fn to_recorded(&self) -> RecordedEvent {
        RecordedEvent {
            position: self.position,
            event_id: self.event_id().to_owned(),
            stream_id: self.stream_id().to_owned(),
            stream_version: self.stream_version(),
            event_type: self.event_type().to_owned(),
            recorded_at: self.recorded_at(),
            payload: self.payload_text().to_owned(),
            metadata: self.metadata_text().map(str::to_owned),
        }
    }
}

impl From<RecordedEvent> for Event {
    fn from(recorded: RecordedEvent) -> Self {
        Event {
            position: recorded.position,
            is_filler: recorded.event_type == FILLER,
            has_decode_error: AtomicBool::new(false),
            fields: Fields::Owned(Box::new(recorded)),
            strict_json: OnceLock::new(),
        }
    }
}

impl Clone for Event {
    /// Copies the fields. The copy does not keep alive the memory that the row was read into.
    fn clone(&self) -> Self {
        self.to_recorded().into()
    }
}

impl PartialEq for Event {
    fn eq(&self, other: &Self) -> bool {
        self.to_recorded() == other.to_recorded()
    }
}

impl Eq for Event {}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.to_recorded().fmt(f)
    }
}

/// The fields of an event, by name. Converts into an [`Event`] that is not read from the log, as in
/// a projector's test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedEvent {
    /// The event's place in the global order.
    pub position: Position,
    /// The id, unique in the whole log.
    pub event_id: String,
    /// The stream: the aggregate that the event belongs to.
    pub stream_id: String,
    /// The event's place in its stream, counted from 1.
    pub stream_version: u64,
    /// The type: what happened.
    pub event_type: String,
    /// The time of the event, in UTC, to the microsecond.
    pub recorded_at: OffsetDateTime,
    /// The payload's JSON text.
    pub payload: String,
    /// The metadata's JSON text; `None` if the event has no metadata.
    pub metadata: Option<String>,
}

/// A time as the database stores it: a `datetime` in UTC.
///
/// Bind this value, not the [`OffsetDateTime`]. sqlx binds an `OffsetDateTime` as a `timestamp`,
/// which MariaDB stores as null before 1970 and from 2038-01-19T03:14:08Z on.
pub(crate) fn utc_datetime(at: OffsetDateTime) -> PrimitiveDateTime {
    let at = at.to_offset(UtcOffset::UTC);
    PrimitiveDateTime::new(at.date(), at.time())
}

/// The time in a column of type `datetime`. An invalid date becomes 1970-01-01T00:00:00Z: a server
/// with a lax `sql_mode` can store `0000-00-00`, and one such row must not stop all projectors.
pub(crate) fn decode_recorded_at(row: &MySqlRow, column: usize) -> OffsetDateTime {
    let recorded_at = row.try_get::<PrimitiveDateTime, _>(column);
    recorded_at.map_or(OffsetDateTime::UNIX_EPOCH, PrimitiveDateTime::assume_utc)
}

/// An event to append. The log assigns the position.
///
/// ```
/// use projectionist::NewEvent;
///
/// let event = NewEvent {
///     stream_version: Some(7),
///     ..NewEvent::new("case-891", "Check confirmation", r#"{"by":"ann"}"#)
/// };
/// assert_eq!(event.check(), Ok(()));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    /// The id; without one, the append generates a UUID. Give an id if an append may be repeated:
    /// the second append is then refused.
    pub event_id: Option<String>,
    /// The stream: the aggregate that the event belongs to. 1 to 200 characters, without control
    /// characters.
    pub stream_id: String,
    /// The version that the event must get, for optimistic concurrency. Without one, the event gets
    /// the next version of its stream.
    pub stream_version: Option<u64>,
    /// The type: what happened. 1 to 200 characters, without control characters, not beginning with
    /// `$`.
    pub event_type: String,
    /// The time of the event; without one, the database's clock at the append.
    pub recorded_at: Option<OffsetDateTime>,
    /// The payload's JSON text, at most [`NewEvent::MAX_JSON`] bytes.
    pub payload: String,
    /// The metadata's JSON text, at most [`NewEvent::MAX_JSON`] bytes.
    pub metadata: Option<String>,
}

impl NewEvent {
    /// The largest payload or metadata, in bytes: what a `mediumtext` column holds.
    pub const MAX_JSON: usize = 16_777_215;
    /// The longest stream id and event type, in characters.
    pub const MAX_NAME: usize = 200;
    /// The longest event id, in ASCII characters.
    pub const MAX_EVENT_ID: usize = 64;

    /// An event with the given stream, type and payload. The log assigns the other fields.
    pub fn new(
        stream_id: impl Into<String>,
        event_type: impl Into<String>,
        payload: impl Into<String>,
    ) -> Self {
        NewEvent {
            event_id: None,
            stream_id: stream_id.into(),
            stream_version: None,
            event_type: event_type.into(),
            recorded_at: None,
            payload: payload.into(),
            metadata: None,
        }
    }

    /// Checks everything that can be checked without the database.
    ///
    /// # Errors
    /// The first invalid field and the reason, in a sentence.
    pub fn check(&self) -> Result<(), String> {
        check_name("stream_id", &self.stream_id)?;
        check_name("event_type", &self.event_type)?;
        let is_id = |id: &str| {
            (1..=Self::MAX_EVENT_ID).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic())
        };
        if !self.event_id.as_deref().is_none_or(is_id) {
            return Err(format!(
                "event_id must be 1 to {} printable ASCII characters",
                Self::MAX_EVENT_ID
            ));
        }
        if self.stream_version == Some(0) {
            return Err("stream_version must be at least 1".into());
        }
        // In UTC the year may be another one, which `time` may be unable to represent.
        let in_utc = |at: OffsetDateTime| at.checked_to_offset(time::UtcOffset::UTC);
        let is_storable =
            |at: OffsetDateTime| in_utc(at).is_some_and(|at| (1000..=9999).contains(&at.year()));
        if !self.recorded_at.is_none_or(is_storable) {
            return Err("recorded_at must lie between the years 1000 and 9999, in UTC".into());
        }
        check_json("payload", &self.payload)?;
        self.metadata.as_deref().map_or(Ok(()), |text| check_json("metadata", text))
    }
}

fn check_name(field: &str, value: &str) -> Result<(), String> {
    let characters = value.chars().count();
    if characters == 0 || characters > NewEvent::MAX_NAME {
        return Err(format!(
            "{field} must be 1 to {} characters, and this one has {characters}",
            NewEvent::MAX_NAME
        ));
    }
    if value.contains(char::is_control) {
        return Err(format!(
            "{field} {value:?} has a control character (U+0000 to U+001F, U+007F to U+009F)"
        ));
    }
    if value.starts_with('$') {
        return Err(format!(
            "{field} {value:?} begins with `$`, which is reserved for the log's own rows"
        ));
    }
    // MySQL compares text padded with spaces: `a` and `a ` would be one stream, or one type.
    if value.ends_with(' ') {
        return Err(format!(
            "{field} {value:?} ends with a space, which the database ignores in comparisons"
        ));
    }
    Ok(())
}

fn check_json(field: &str, text: &str) -> Result<(), String> {
    if text.len() > NewEvent::MAX_JSON {
        return Err(format!(
            "{field} has {} bytes; at most {} can be stored",
            text.len(),
            NewEvent::MAX_JSON
        ));
    }
    serde_json::from_str::<serde::de::IgnoredAny>(text)
        .map(|_| ())
        .map_err(|error| format!("{field} is not JSON: {error}"))
}
