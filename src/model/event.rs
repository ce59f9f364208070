//! A recorded fact and its place in the one global order.

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

/// The event type of a row that only fills a position whose transaction rolled back.
///
/// Types that begin with `$` belong to the log itself: [`NewEvent::check`] refuses them.
pub const FILLER: &str = "$filler";

/// An event's place in the one global order of the log: `events.position`.
///
/// Positions start at 1, and below the high-water mark they have no holes.
/// [`Position::START`] (0) stands before the first event.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Position(u64);

impl Position {
    /// Before the first event.
    pub const START: Position = Position(0);

    /// The position with this number.
    pub const fn new(number: u64) -> Self {
        Position(number)
    }

    /// The number, as it stands in the database.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The position after this one.
    pub const fn next(self) -> Self {
        Position(self.0.saturating_add(1))
    }

    /// The position before this one; [`Position::START`] has none before it and returns itself.
    pub const fn previous(self) -> Self {
        Position(self.0.saturating_sub(1))
    }

    /// How many positions lie above `earlier`, up to and with this one. Zero if there are none.
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
/// Its fields stay where the server or the queue put them until a projector asks: most projectors
/// look at few of the events that they pass, and at little of those.
pub struct Event {
    position: Position,
    /// Asked of every event, by every projector.
    is_filler: bool,
    /// Whether a field was asked for that the row does not have as it should.
    has_decode_error: AtomicBool,
    fields: Fields,
    /// Payload and metadata, where they are JSON to the server and not to serde_json. Made when
    /// they are first read.
    strict_json: OnceLock<Box<StrictJson>>,
}

/// JSON texts that [`server_json::to_strict`] has changed.
#[derive(Default)]
struct StrictJson {
    payload: Option<String>,
    metadata: Option<String>,
}

/// Where an event's fields are.
enum Fields {
    /// In the row that the server sent.
    Row(MySqlRow),
    Owned(Box<RecordedEvent>),
}

/// The columns of such a row: those of the log's table, in its order.
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

/// The fields of an event, by name: what an [`Event`] is made of where it does not come from the
/// log, as in a test of a projector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordedEvent {
    /// Its place in the global order.
    pub position: Position,
    /// Unique over the whole log.
    pub event_id: String,
    /// The aggregate it belongs to.
    pub stream_id: String,
    /// Its place in the stream, from 1.
    pub stream_version: u64,
    /// What happened.
    pub event_type: String,
    /// When, in UTC, to the microsecond.
    pub recorded_at: OffsetDateTime,
    /// The payload's JSON text.
    pub payload: String,
    /// The metadata's JSON text, where there is one.
    pub metadata: Option<String>,
}

/// A time as the database stores it: a `datetime` in UTC.
///
/// Bind this and not the [`OffsetDateTime`]: sqlx binds that as a `timestamp`, which MariaDB turns
/// into null before 1970 and from 2038-01-19T03:14:08Z on.
pub(crate) fn utc_datetime(at: OffsetDateTime) -> PrimitiveDateTime {
    let at = at.to_offset(UtcOffset::UTC);
    PrimitiveDateTime::new(at.date(), at.time())
}

/// When an event was recorded. What is no date (`0000-00-00`, which a server stores whose
/// `sql_mode` is lax) is read as 1970-01-01, 00:00 in UTC: one row that says no time must not stop
/// everybody behind it.
pub(crate) fn decode_recorded_at(row: &MySqlRow, column: usize) -> OffsetDateTime {
    let recorded_at = row.try_get::<PrimitiveDateTime, _>(column);
    recorded_at.map_or(OffsetDateTime::UNIX_EPOCH, PrimitiveDateTime::assume_utc)
}

impl Event {
    /// The event in a row of the log, with its columns in the order of the log's table. Its
    /// position is decoded, and it is seen whether it is a tombstone; the rest is decoded when it
    /// is asked for, unless [`Event::check`] looks.
    ///
    /// # Errors
    /// If these are not what the log's table has there.
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

    /// Looks at every field.
    ///
    /// # Errors
    /// If one is not what the log's table has there.
    pub(crate) fn check(&self) -> Result<(), sqlx::Error> {
        let Fields::Row(row) = &self.fields else { return Ok(()) };
        // By name, for the error to have it.
        for column in ["event_id", "stream_id", "event_type", "payload"] {
            row.try_get::<&str, _>(column)?;
        }
        row.try_get::<Option<&str>, _>("metadata")?;
        row.try_get::<u64, _>("stream_version").map(|_| ())
    }

    /// Why a field could not be read that was asked for; `None`: all could. Whoever asked was given
    /// nothing in its place, and must not be believed.
    pub(crate) fn decode_error(&self) -> Option<sqlx::Error> {
        self.has_decode_error.load(Ordering::Relaxed).then(|| self.check().err()).flatten()
    }

    /// Whether its type is one of these. One whose type cannot be read may be: it must not be
    /// passed over, and is spoiled.
    pub(crate) fn may_match(&self, types: &HashSet<String>) -> bool {
        match self.event_type() {
            "" => self.has_decode_error.load(Ordering::Relaxed),
            event_type => types.contains(event_type),
        }
    }

    /// Its place in the global order.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Unique over the whole log; the idempotency key for effects outside the database.
    pub fn event_id(&self) -> &str {
        self.field(Column::EventId, |given| given.event_id.as_str())
    }

    /// The aggregate it belongs to.
    pub fn stream_id(&self) -> &str {
        self.field(Column::StreamId, |given| given.stream_id.as_str())
    }

    /// Its place in the stream, from 1.
    pub fn stream_version(&self) -> u64 {
        self.field(Column::StreamVersion, |given| given.stream_version)
    }

    /// What happened; projectors subscribe by it.
    pub fn event_type(&self) -> &str {
        self.field(Column::EventType, |given| given.event_type.as_str())
    }

    /// When, in UTC, to the microsecond.
    ///
    /// To bind it to a statement, use [`Event::recorded_at_utc`]. An [`OffsetDateTime`] is bound as
    /// a `timestamp`, which MariaDB stores as null before 1970 and from 2038-01-19T03:14:08Z on.
    pub fn recorded_at(&self) -> OffsetDateTime {
        match &self.fields {
            Fields::Row(row) => decode_recorded_at(row, Column::RecordedAt as usize),
            Fields::Owned(recorded) => recorded.recorded_at,
        }
    }

    /// When, in UTC, to the microsecond, as a `datetime` column stores it. This is the one to bind
    /// to a statement.
    pub fn recorded_at_utc(&self) -> PrimitiveDateTime {
        utc_datetime(self.recorded_at())
    }

    /// The payload's JSON text, byte for byte as it was appended.
    pub fn payload_text(&self) -> &str {
        self.field(Column::Payload, |given| given.payload.as_str())
    }

    /// The metadata's JSON text, where there is one.
    pub fn metadata_text(&self) -> Option<&str> {
        self.field(Column::Metadata, |given| given.metadata.as_deref())
    }

    /// Decodes the payload. What the database accepts as JSON and serde_json does not (MariaDB's
    /// `\\'`, `1.`; MySQL's NUL after the document) is read as the database reads it.
    ///
    /// # Errors
    /// If the JSON does not have the shape of `T`. Returned from a handler, it breaks the projector
    /// at this event.
    pub fn payload<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        let read = serde_json::from_str(self.payload_text());
        read.or_else(|error| self.strict_payload().map_or(Err(error), serde_json::from_str))
    }

    /// Decodes the metadata; `null` stands in where there is none, so `T` may be an `Option`.
    ///
    /// # Errors
    /// If the JSON does not have the shape of `T`.
    pub fn metadata<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        let read = serde_json::from_str(self.metadata_text().unwrap_or("null"));
        read.or_else(|error| self.strict_metadata().map_or(Err(error), serde_json::from_str))
    }

    /// The payload for serde_json, where that has refused the payload as it was written; `None`
    /// where that cannot help.
    pub(crate) fn strict_payload(&self) -> Option<&str> {
        self.strict_json().payload.as_deref()
    }

    /// The metadata, likewise.
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

    /// Whether this row only fills a position. Tombstones move projectors on and are shown to none.
    pub fn is_filler(&self) -> bool {
        self.is_filler
    }

    /// Payload and metadata, in bytes. Decodes neither.
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

    /// A field, wherever it is.
    fn field<'e, T>(&'e self, column: Column, given: impl FnOnce(&'e RecordedEvent) -> T) -> T
    where
        T: Decode<'e, MySql> + Type<MySql> + Default,
    {
        match &self.fields {
            Fields::Row(row) => row.try_get(column as usize).unwrap_or_else(|_| {
                self.has_decode_error.store(true, Ordering::Relaxed);
                T::default()
            }),
            Fields::Owned(recorded) => given(recorded),
        }
    }

    /// Its fields, by name.
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
    /// A copy of its fields, which keeps nothing of what else was read with it.
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

/// An event that is to be appended. The log gives it its position.
///
/// ```
/// use projectionist::NewEvent;
///
/// let event = NewEvent { stream_version: Some(7), ..NewEvent::new("case-891", "Check confirmation", r#"{"by":"ann"}"#) };
/// assert_eq!(event.check(), Ok(()));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    /// A UUID is made where none is given. Give one where an append may be repeated: the second is
    /// refused.
    pub event_id: Option<String>,
    /// The aggregate it belongs to: 1 to 200 characters, without control characters.
    pub stream_id: String,
    /// The version it must get, for optimistic concurrency; without one, it gets the stream's next.
    pub stream_version: Option<u64>,
    /// What happened: 1 to 200 characters, without control characters, not beginning with `$`.
    pub event_type: String,
    /// When; without one, the database's clock at the append.
    pub recorded_at: Option<OffsetDateTime>,
    /// The payload's JSON text, at most [`NewEvent::MAX_JSON`] bytes.
    pub payload: String,
    /// The metadata's JSON text, likewise.
    pub metadata: Option<String>,
}

impl NewEvent {
    /// The largest payload or metadata, in bytes: what a `mediumtext` column holds.
    pub const MAX_JSON: usize = 16_777_215;
    /// The longest stream id and event type, in characters.
    pub const MAX_NAME: usize = 200;
    /// The longest event id, in ASCII characters.
    pub const MAX_EVENT_ID: usize = 64;

    /// An event of a stream, with its payload's JSON text; everything else as the log gives it.
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
    /// The first field that does not hold, and why, in a sentence.
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
            return Err("stream_version counts from 1".into());
        }
        // In UTC it may lie in the year before or after, which need not be one that `time` knows.
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
            "{field} must be 1 to {} characters, and has {characters}",
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
            "{field} {value:?} begins with `$`, which is kept for the log's own rows"
        ));
    }
    // MySQL compares text padded with spaces: "a" and "a " would be one stream, and one type.
    if value.ends_with(' ') {
        return Err(format!(
            "{field} {value:?} ends with a space, which the database would not tell apart"
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
