//! `append`: events from a file or standard input, one JSON object a line.

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
use crate::model::error::{Error, is_transient, server_error_number};
use crate::model::event::{NewEvent, Position};
use crate::store::{AppendError, EventStore};

/// Payload and metadata at their largest, in JSON, with room for the rest.
const MAX_LINE_BYTES: u64 = 2 * NewEvent::MAX_JSON as u64 + 65_536;

/// Events in one transaction, and their bytes.
const MAX_TRANSACTION_EVENTS: usize = 500;
const MAX_TRANSACTION_BYTES: usize = 4 * 1024 * 1024;

/// A CHECK of ours did not hold, on MySQL and on MariaDB: their ideas of JSON are narrower than
/// ours.
const CHECK_VIOLATION_CODES: [u16; 2] = [3819, 4025];

/// Events that trickle in, from a pipe that stays open, are stored this soon.
const MAX_BUFFER_DELAY: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
#[command(after_help = "\
Each line is an object with stream_id, event_type and payload (any JSON) and, optionally, event_id (unique; made where \
there is none), stream_version (must be the stream's next; given where there is none), recorded_at (RFC 3339; else now) \
and metadata (any JSON).\n\n\
Example: {\"stream_id\":\"case-891\",\"event_type\":\"Confirmation of receipt\",\"payload\":{\"channel\":\"Internet\"}}")]
pub(super) struct AppendCommand {
    /// The file to read; standard input where there is none, or for `-`
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
}

/// One line. A key that is not known would be lost without a word, so it is an error.
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

/// What the reading thread sends.
#[derive(Debug)]
enum InputMessage {
    /// A line's number, and its event or the reason why it has none.
    Line(u64, Result<NewEvent, String>),
    /// The input was read to its end.
    End,
}

/// The lines of an input, read on a thread: reading standard input blocks.
struct LineReader {
    receiver: mpsc::Receiver<InputMessage>,
    /// The last line that was received.
    last_line: u64,
}

impl LineReader {
    fn read(input: Box<dyn Read + Send>) -> Self {
        let (sender, receiver) = mpsc::channel(MAX_TRANSACTION_EVENTS);
        std::thread::spawn(move || read_lines(input, &sender));
        LineReader { receiver, last_line: 0 }
    }

    /// The next line with something in it; `None` at the end of the input.
    async fn next(&mut self) -> Option<(u64, Result<NewEvent, String>)> {
        match self.receiver.recv().await {
            Some(InputMessage::Line(line, event)) => {
                self.last_line = line;
                Some((line, event))
            }
            Some(InputMessage::End) => None,
            // The thread panicked: the input may go on.
            None => Some((
                self.last_line + 1,
                Err("the reading of the input broke off here, or soon after it".into()),
            )),
        }
    }
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
        match self.buffered.len() >= MAX_TRANSACTION_EVENTS
            || self.buffered_bytes >= MAX_TRANSACTION_BYTES
        {
            true => self.flush().await,
            false => Ok(()),
        }
    }

    /// Stores what waits. At an event that cannot be stored, those before it are, and the error
    /// names its line.
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
                // The first to be refused need not be the first that is bad: those before it are
                // tried without it.
                Some(index) => (end, refused) = (next + index, Some(reason)),
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
            "line {line}: {reason}\n{}; nothing from line {line} on is",
            self.summary("stored before it:")
        ))
    }

    fn append_error(&self, error: AppendError) -> Error {
        let with_summary = |error: &dyn std::fmt::Display| {
            format!("{error}\n{}", self.summary("stored before that:"))
        };
        match error {
            AppendError::Database(error) if is_transient(&error) => {
                Error::Unreachable(with_summary(&Error::Database(error)))
            }
            AppendError::Database(error) => Error::Input(with_summary(&Error::Database(error))),
            error => Error::Input(with_summary(&error)),
        }
    }

    fn summary(&self, verb: &str) -> String {
        let events = if self.stored_events == 1 { "event" } else { "events" };
        match self.last_position {
            Some(last) => format!("{verb} {} {events}, last position {last}", self.stored_events),
            None => format!("{verb} 0 events"),
        }
    }
}

/// Why an event was refused; `None` where the error says nothing about the events.
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
                "the database does not take its payload or metadata as JSON: half a surrogate pair, a number out of \
                 range, or nested too deeply (MariaDB takes 31 levels, MySQL 100) ({error})"
            ))
        }
        AppendError::Database(_) => None,
    }
}

/// Which of these events was refused, as far as the error tells.
fn rejected_index(error: &AppendError, events: &[NewEvent]) -> Option<usize> {
    match error {
        AppendError::InvalidEvent { index, .. } | AppendError::WrongVersion { index, .. } => {
            Some(*index)
        }
        AppendError::DuplicateEventId { event_id } if events.len() > 1 => {
            // The last of them: the id may stand twice among the lines, too.
            events.iter().rposition(|event| event.event_id.as_ref() == Some(event_id))
        }
        AppendError::DuplicateEventId { .. } | AppendError::Database(_) => {
            (events.len() == 1).then_some(0)
        }
    }
}

/// Sends each line, up to the first that is refused, or up to the end and a message that says so.
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

/// The event of a line; `None` for an empty one.
fn parse_line(text: &[u8]) -> Result<Option<NewEvent>, String> {
    let text = std::str::from_utf8(text)
        .map_err(|error| format!("not UTF-8, from byte {} on", error.valid_up_to() + 1))?;
    if text.trim().is_empty() {
        return Ok(None);
    }
    let line: Line<'_> = serde_json::from_str(text).map_err(|error| {
        // The parser says where within the text, which is one line.
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
        let event = parse_line(
            br#"{"stream_id":"a","event_type":"T02 \"x\"","payload":{ "n" : 1.0 },"metadata":null,"recorded_at":"2010-10-02T07:20:39.266000Z"}"#,
        );
        let event = event.expect("a line").expect("an event");
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
            (b"{\"stream_id\":\"\",\"event_type\":\"b\",\"payload\":1}", "stream_id must be 1 to 200 characters"),
            (b"{\"stream_id\":\"a\",\"event_type\":\"$filler\",\"payload\":1}", "begins with `$`"),
            (b"{\"stream_id\":\"a\",\"event_type\":\"b\",\"payload\":1,\"recorded_at\":\"yesterday\"}", "recorded_at"),
            (b"{\"stream_id\":\"a\",\"event_type\":\"b\",\"payload\":1,\"event_id\":\"\"}", "event_id must be"),
            (b"{\"stream_id\":\"a\\u001b[2J\",\"event_type\":\"b\",\"payload\":1}", "has a control character"),
            (b"{\"stream_id\":\"a\",\"event_type\":\"b\\n\",\"payload\":1}", "has a control character"),
            (b"{\"stream_id\":\"a\",\"event_type\":\"b\\u0085\",\"payload\":1}", "has a control character"),
            (b"{\"stream_id\":\"\xff\"}", "not UTF-8, from byte 15 on"),
            (b"stream_id,event_type", "expected value"),
        ] {
            let error = parse_line(line).expect_err(reason);
            assert!(error.contains(reason) || reason == "recorded_at", "{error}");
        }
    }

    /// A line with everything in it that a line may have.
    const LINE: &str = r#"{"stream_id":"a","stream_version":7,"event_type":"T02 \"x\"","payload":{"n":[1.0,"\u00e9"]},"metadata":{"m":null},"event_id":"id-1","recorded_at":"2010-10-02T07:20:39.266Z"}"#;

    #[test]
    fn an_endless_line_is_refused_without_being_read_whole() {
        let (sender, mut events) = mpsc::channel(1);
        // More than any memory holds.
        let endless = Box::new(std::io::repeat(b' '));
        let reading = std::thread::spawn(move || read_lines(endless, &sender));
        let Some(InputMessage::Line(line, read)) = events.blocking_recv() else {
            panic!("it is not refused")
        };
        assert!(line == 1 && read.is_err_and(|reason| reason.contains("longer than")));
        reading.join().expect("it has ended");
    }

    /// Two lines, and then a panic.
    struct PanickingReader(std::io::Cursor<Vec<u8>>);

    impl Read for PanickingReader {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            match self.0.read(buffer) {
                Ok(0) => panic!("as the test asks"),
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
        let Some((3, Err(reason))) = lines.next().await else { panic!("it looks like the end") };
        assert!(reason.contains("broke off"), "{reason}");
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

        /// Whatever is made of a line, what is stored of it keeps to the table's bounds, and is no
        /// larger than the line.
        #[test]
        fn a_corrupted_line_is_refused_or_an_event_no_larger_than_itself(line in corrupted::bytes(LINE)) {
            let Ok(Some(event)) = parse_line(&line) else { return Ok(()) };
            prop_assert_eq!(event.check(), Ok(()));
            let names = event.stream_id.len() + event.event_type.len() + event.event_id.map_or(0, |id| id.len());
            let json = event.payload.len() + event.metadata.map_or(0, |metadata| metadata.len());
            prop_assert!(names + json <= line.len());
        }

        /// Whatever the input is, its lines are told in order, and reading ends with the first that
        /// is refused.
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
