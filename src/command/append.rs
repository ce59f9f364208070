//! The `append` command: appends events from a file or standard input, one JSON object per line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use serde_json::value::RawValue;
use time::OffsetDateTime;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::print;
use crate::command::config::Config;
use crate::database::DatabaseError;
use crate::database::error::{is_transient, server_error_number};
use crate::engine::error::Error;
use crate::model::event::{NewEvent, Position};
use crate::model::text::count;
use crate::store::{AppendError, EventStore};

/// The longest line, in bytes: the largest payload and metadata, and 64 KiB for the other fields.
const MAX_LINE_BYTES: u64 = 2 * NewEvent::MAX_JSON as u64 + 65_536;

/// The most events in one transaction, and the most bytes of their payloads and metadata.
const MAX_TRANSACTION_EVENTS: usize = 500;
const MAX_TRANSACTION_BYTES: usize = 4 * 1024 * 1024;

/// The error codes of a violated CHECK constraint on MySQL and on MariaDB. Both accept less JSON
/// than our parser does.
const CHECK_VIOLATION_CODES: [u16; 2] = [3819, 4025];

/// The longest time that an event waits for others of its transaction, if the input is a slow pipe.
const MAX_BUFFER_DELAY: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
#[command(after_help = "\
Each line is an object with stream_id, event_type and payload (any JSON). Optional keys: event_id \
(unique; default: generated), stream_version (must be the stream's next; default: the next), \
recorded_at (RFC 3339; default: now) and metadata (any JSON).\n\n\
Examples:\n\
\x20 projectionist append events.jsonl\n\
\x20 projectionist append < events.jsonl\n\n\
A line:\n\
\x20 {\"stream_id\":\"case-891\",\"event_type\":\"Opened\",\"payload\":{\"at\":\"web\"}}")]
pub(super) struct AppendCommand {
    /// The file to read; without it, or with `-`, standard input is read
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

impl AppendCommand {
    pub(super) async fn run(self, config: &Config) -> Result<(), Error> {
        let input: Box<dyn Read + Send> = match self.file.filter(|file| file.as_os_str() != "-") {
            None => Box::new(std::io::stdin()),
            Some(file) => Box::new(File::open(&file).map_err(|error| {
                Error::Input(format!("cannot read {}: {error}", file.display()))
            })?),
        };
        let mut appender = Appender {
            store: EventStore::new(&config.database().await?),
            buffered: Vec::new(),
            buffered_since: None,
            buffered_bytes: 0,
            stored_events: 0,
            last_position: None,
        };
        let mut lines = LineReader::read(input);
        loop {
            let next = match appender.buffered_since {
                None => lines.next().await,
                Some(since) => match timeout_at(since + MAX_BUFFER_DELAY, lines.next()).await {
                    Ok(next) => next,
                    Err(_) => {
                        appender.flush().await?;
                        continue;
                    }
                },
            };
            match next {
                None => break,
                Some((line, Ok(event))) => appender.add(line, event).await?,
                Some((line, Err(reason))) => {
                    appender.flush().await?;
                    return Err(appender.line_error(line, &reason));
                }
            }
        }
        appender.flush().await?;
        print(appender.summary("appended"))
    }
}

struct Appender {
    store: EventStore,
    buffered: Vec<(u64, NewEvent)>,
    buffered_since: Option<Instant>,
    buffered_bytes: usize,
    stored_events: usize,
    last_position: Option<Position>,
}

impl Appender {
    async fn add(&mut self, line: u64, event: NewEvent) -> Result<(), Error> {
        self.buffered_bytes += event.payload.len() + event.metadata.as_ref().map_or(0, String::len);
        self.buffered.push((line, event));
        self.buffered_since.get_or_insert_with(Instant::now);
        if self.buffered.len() >= MAX_TRANSACTION_EVENTS
            || self.buffered_bytes >= MAX_TRANSACTION_BYTES
        {
            self.flush().await?;
        }
        Ok(())
    }

    /// Stores the buffered events. If one is refused, stores the events before it and returns an
    /// error that names its line.
    async fn flush(&mut self) -> Result<(), Error> {
        (self.buffered_bytes, self.buffered_since) = (0, None);
        let (lines, events): (Vec<u64>, Vec<NewEvent>) =
            std::mem::take(&mut self.buffered).into_iter().unzip();
        let (mut next, mut end, mut max_events) = (0, events.len(), events.len());
        let mut refused = None;
        while next < end {
            let attempt = &events[next..end.min(next + max_events)];
            let Err(error) = self.store(attempt).await else {
                next += attempt.len();
                continue;
            };
            let Some(reason) = rejection_reason(&error) else {
                return Err(self.append_error(error));
            };
            match rejected_index(&error, attempt) {
                // The transaction was rolled back. The events before the refused one are tried
                // again, and one of them may be refused, too.
                Some(index) => (end, refused) = (next + index, Some(reason)),
                // The error names no event: smaller transactions find it.
                None => max_events = attempt.len() / 2,
            }
        }
        refused.map_or(Ok(()), |reason| Err(self.line_error(lines[end], &reason)))
    }

    async fn store(&mut self, events: &[NewEvent]) -> Result<(), AppendError> {
        if !events.is_empty() {
            let appended = self.store.append(events).await?;
            self.stored_events += appended.events;
            self.last_position = Some(appended.last);
        }
        Ok(())
    }

    fn line_error(&self, line: u64, reason: &str) -> Error {
        Error::Input(format!(
            "line {line}: {reason}\n{}; no event from line {line} on was stored",
            self.summary("stored before it:")
        ))
    }

    fn append_error(&self, error: AppendError) -> Error {
        let with_summary = |error: &dyn std::fmt::Display| {
            format!("{error}\n{}", self.summary("stored before that:"))
        };
        match error {
            AppendError::Database(error) if is_transient(&error) => {
                Error::Unreachable(with_summary(&DatabaseError::Statement(error)))
            }
            AppendError::Database(error) => {
                Error::Input(with_summary(&DatabaseError::Statement(error)))
            }
            error => Error::Input(with_summary(&error)),
        }
    }

    fn summary(&self, verb: &str) -> String {
        let events = count(self.stored_events as u64, "event");
        match self.last_position {
            Some(last) => format!("{verb} {events}, last position {last}"),
            None => format!("{verb} {events}"),
        }
    }
}

/// Returns why an event was refused, or `None` if the error is not about an event.
fn rejection_reason(error: &AppendError) -> Option<String> {
    match error {
        AppendError::InvalidEvent { reason, .. } => Some(reason.clone()),
        AppendError::WrongVersion { .. } | AppendError::DuplicateEventId { .. } => {
            Some(error.to_string())
        }
        AppendError::Database(error)
            if server_error_number(error)
                .is_some_and(|number| CHECK_VIOLATION_CODES.contains(&number)) =>
        {
            Some(format!(
                "the database does not accept its payload or metadata as JSON: half a surrogate \
                pair, a number out of range, or nested too deeply (MariaDB accepts 31 levels, \
                MySQL 100) ({error})"
            ))
        }
        AppendError::Database(_) => None,
    }
}

/// Returns the index of the refused event, or `None` if the error does not identify it.
fn rejected_index(error: &AppendError, events: &[NewEvent]) -> Option<usize> {
    match error {
        AppendError::InvalidEvent { index, .. } | AppendError::WrongVersion { index, .. } => {
            Some(*index)
        }
        AppendError::DuplicateEventId { event_id } if events.len() > 1 => {
            // The last event with this id, because the input itself may contain the id twice.
            events.iter().rposition(|event| event.event_id.as_ref() == Some(event_id))
        }
        AppendError::DuplicateEventId { .. } | AppendError::Database(_) => {
            (events.len() == 1).then_some(0)
        }
    }
}

/// Reads the lines of an input on a thread of its own, because reading standard input blocks.
struct LineReader {
    receiver: mpsc::Receiver<InputMessage>,
    /// The number of the last line that was received.
    last_line: u64,
}

impl LineReader {
    fn read(input: Box<dyn Read + Send>) -> Self {
        let (sender, receiver) = mpsc::channel(MAX_TRANSACTION_EVENTS);
        std::thread::spawn(move || read_lines(input, &sender));
        LineReader { receiver, last_line: 0 }
    }

    /// Returns the next line that is not empty, or `None` at the end of the input.
    async fn next(&mut self) -> Option<(u64, Result<NewEvent, String>)> {
        match self.receiver.recv().await {
            Some(InputMessage::Line(line, event)) => {
                self.last_line = line;
                Some((line, event))
            }
            Some(InputMessage::End) => None,
            // The thread panicked. The input may have more lines, so this is not its end.
            None => Some((
                self.last_line + 1,
                Err("reading the input failed at this line or soon after it".into()),
            )),
        }
    }
}

/// A message of the thread that reads the input.
#[derive(Debug)]
enum InputMessage {
    /// The number of a line, and its event or the reason why the line is refused.
    Line(u64, Result<NewEvent, String>),
    /// The input was read to its end.
    End,
}

/// Sends each line up to the first that is refused. If none is, sends all lines and then
/// [`InputMessage::End`].
fn read_lines(input: Box<dyn Read + Send>, lines: &mpsc::Sender<InputMessage>) {
    let mut input = BufReader::new(input);
    let mut text = Vec::new();
    for line in 1.. {
        text.clear();
        let read = match (&mut input).take(MAX_LINE_BYTES + 1).read_until(b'\n', &mut text) {
            Ok(0) => {
                let _ = lines.blocking_send(InputMessage::End);
                return;
            }
            Ok(_) if text.len() as u64 > MAX_LINE_BYTES => {
                Some(Err(format!("longer than {MAX_LINE_BYTES} bytes")))
            }
            Ok(_) => parse_line(&text).transpose(),
            Err(error) => Some(Err(format!("cannot be read: {error}"))),
        };
        let Some(read) = read else { continue };
        let failed = read.is_err();
        if lines.blocking_send(InputMessage::Line(line, read)).is_err() || failed {
            return;
        }
    }
}

/// One line of the input. An unknown key is an error, because it would be dropped silently.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line<'a> {
    #[serde(borrow)]
    stream_id: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    event_type: std::borrow::Cow<'a, str>,
    #[serde(borrow)]
    payload: &'a RawValue,
    event_id: Option<String>,
    stream_version: Option<u64>,
    #[serde(default, with = "time::serde::rfc3339::option")]
    recorded_at: Option<OffsetDateTime>,
    #[serde(borrow)]
    metadata: Option<&'a RawValue>,
}

/// Parses a line into an event. Returns `None` for an empty line.
fn parse_line(text: &[u8]) -> Result<Option<NewEvent>, String> {
    let text = std::str::from_utf8(text)
        .map_err(|error| format!("not UTF-8, from byte {} on", error.valid_up_to() + 1))?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    let line: Line<'_> = serde_json::from_str(text).map_err(|error| {
        // The parser counts lines within `text`, which always has one line.
        error.to_string().replace(" at line 1 column ", ", at column ")
    })?;
    let event = NewEvent {
        event_id: line.event_id,
        stream_id: line.stream_id.into_owned(),
        stream_version: line.stream_version,
        event_type: line.event_type.into_owned(),
        recorded_at: line.recorded_at,
        payload: line.payload.get().to_owned(),
        metadata: line.metadata.map(|metadata| metadata.get().to_owned()),
    };
    event.check()?;
    Ok(Some(event))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::corrupted;

    #[test]
    fn a_line_keeps_its_payload_byte_for_byte() {
        let line = concat!(
            r#"{"stream_id":"a","event_type":"T02 \"x\"","payload":{ "n" : 1.0 },"#,
            r#""metadata":null,"recorded_at":"2010-10-02T07:20:39.266000Z"}"#,
        );
        let event =
            parse_line(line.as_bytes()).expect("the line is valid").expect("it has an event");
        assert_eq!(
            (event.payload.as_str(), event.metadata, event.event_type.as_str()),
            ("{ \"n\" : 1.0 }", None, "T02 \"x\"")
        );
    }

    #[test]
    fn a_bad_line_is_refused_with_its_reason() {
        for (line, reason) in [
            (&b"{\"stream_id\":\"a\"}"[..], "missing field `event_type`, at column 17"),
            (
                b"{\"stream_id\":\"a\",\"event_type\":\"b\",\"payload\":1,\"recordedAt\":1}",
                "unknown field `recordedAt`",
            ),
            (
                br#"{"stream_id":"","event_type":"b","payload":1}"#,
                "stream_id must be 1 to 200 characters",
            ),
            (br#"{"stream_id":"a","event_type":"$filler","payload":1}"#, "begins with `$`"),
            (
                br#"{"stream_id":"a","event_type":"b","payload":1,"recorded_at":"yesterday"}"#,
                "recorded_at",
            ),
            (
                br#"{"stream_id":"a","event_type":"b","payload":1,"event_id":""}"#,
                "event_id must be",
            ),
            (
                br#"{"stream_id":"a\u001b[2J","event_type":"b","payload":1}"#,
                "has a control character",
            ),
            (br#"{"stream_id":"a","event_type":"b\n","payload":1}"#, "has a control character"),
            (br#"{"stream_id":"a","event_type":"b\u0085","payload":1}"#, "has a control character"),
            (b"{\"stream_id\":\"\xff\"}", "not UTF-8, from byte 15 on"),
            (b"stream_id,event_type", "expected value"),
        ] {
            let error = parse_line(line).expect_err(reason);
            assert!(error.contains(reason) || reason == "recorded_at", "{error}");
        }
    }

    /// A line with every key.
    const LINE: &str = concat!(
        r#"{"stream_id":"a","stream_version":7,"event_type":"T02 \"x\"","#,
        r#""payload":{"n":[1.0,"\u00e9"]},"metadata":{"m":null},"event_id":"id-1","#,
        r#""recorded_at":"2010-10-02T07:20:39.266Z"}"#,
    );

    #[test]
    fn an_endless_line_is_refused_without_being_read_whole() {
        let (sender, mut events) = mpsc::channel(1);
        // An input that never ends.
        let endless = Box::new(std::io::repeat(b' '));
        let reading = std::thread::spawn(move || read_lines(endless, &sender));
        let Some(InputMessage::Line(line, read)) = events.blocking_recv() else {
            panic!("the line is not refused")
        };
        assert!(line == 1 && read.is_err_and(|reason| reason.contains("longer than")));
        reading.join().expect("the reader does not panic");
    }

    /// A reader that panics at the end of its bytes.
    struct PanickingReader(std::io::Cursor<Vec<u8>>);

    impl Read for PanickingReader {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            match self.0.read(buffer) {
                Ok(0) => panic!("the test makes the reader panic"),
                read => read,
            }
        }
    }

    #[tokio::test]
    async fn a_panicking_reader_is_an_error_and_not_the_end_of_input() {
        let mut lines = LineReader::read(Box::new(PanickingReader(std::io::Cursor::new(
            format!("{LINE}\n{LINE}\n").into_bytes(),
        ))));
        for number in [1, 2] {
            assert!(
                lines.next().await.is_some_and(|(line, event)| line == number && event.is_ok())
            );
        }
        let Some((3, Err(reason))) = lines.next().await else {
            panic!("the panic is not an error at line 3")
        };
        assert!(reason.contains("reading the input failed"), "{reason}");
    }

    #[tokio::test]
    async fn the_end_of_input_is_reported_after_the_last_line() {
        let mut lines = LineReader::read(Box::new(std::io::Cursor::new(LINE.as_bytes())));
        assert!(lines.next().await.is_some_and(|(line, event)| line == 1 && event.is_ok()));
        assert!(lines.next().await.is_none());
    }

    #[test]
    fn a_date_outside_the_calendar_in_utc_is_refused() {
        for at in ["9999-12-31T23:59:59-01:00", "0999-12-31T23:59:59Z", "0000-01-01T00:00:00+01:00"]
        {
            let line =
                format!(r#"{{"stream_id":"a","event_type":"b","payload":1,"recorded_at":"{at}"}}"#);
            let error = parse_line(line.as_bytes()).expect_err(at);
            assert!(error.contains("recorded_at must lie"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_line_makes_the_parser_panic(line in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse_line(&line);
        }

        /// An event that is parsed from a corrupted line is within the limits of the table, and not
        /// larger than the line.
        #[test]
        fn a_corrupted_line_is_refused_or_an_event_no_larger_than_itself(
            line in corrupted::bytes(LINE),
        ) {
            let Ok(Some(event)) = parse_line(&line) else { return Ok(()) };
            prop_assert_eq!(event.check(), Ok(()));
            let id = event.event_id.map_or(0, |id| id.len());
            let names = event.stream_id.len() + event.event_type.len() + id;
            let json = event.payload.len() + event.metadata.map_or(0, |metadata| metadata.len());
            prop_assert!(names + json <= line.len());
        }

        /// Lines of a corrupted input are sent in order, and reading ends with the first that is
        /// refused.
        #[test]
        fn corrupted_lines_are_read_in_order_up_to_the_first_refused(
            input in corrupted::bytes(&[LINE, "", LINE, LINE].join("\n")),
        ) {
            let lines = input.split_inclusive(|&byte| byte == b'\n').count() as u64;
            let (sender, mut events) = mpsc::channel(100);
            read_lines(Box::new(std::io::Cursor::new(input)), &sender);
            drop(sender);
            let (mut read, mut has_ended) = (Vec::new(), false);
            while let Some(next) = events.blocking_recv() {
                prop_assert!(!has_ended);
                match next {
                    InputMessage::Line(line, event) => read.push((line, event)),
                    InputMessage::End => has_ended = true,
                }
            }
            prop_assert!(read.is_sorted_by(|(before, _), (after, _)| before < after));
            prop_assert!(read.iter().all(|&(line, _)| line <= lines));
            let refused = read.iter().position(|(_, event)| event.is_err());
            prop_assert!(refused.is_none_or(|refused| refused + 1 == read.len()));
            prop_assert_eq!(has_ended, refused.is_none());
        }
    }
}
