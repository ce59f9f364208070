//! Text that leaves the process: for a terminal, a log, an alert or the ledger.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{HumanCount, HumanDuration};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The text that sqlx puts before a message of the server.
const SQLX_PREFIX: &str = "error returned from database: ";

static REDACTS_ERRORS: AtomicBool = AtomicBool::new(false);

/// Reduces errors of the server to their numbers, for the rest of the process. A server's message
/// may quote values of a row.
pub(crate) fn redact_errors() {
    REDACTS_ERRORS.store(true, Ordering::Relaxed);
}

/// Whether errors of the server are reduced to their numbers.
pub(crate) fn redacts_errors() -> bool {
    REDACTS_ERRORS.load(Ordering::Relaxed)
}

/// An error of the server, reduced to its numbers.
pub(crate) fn format_error_number(number: &str, state: Option<&str>) -> String {
    match state {
        Some(state) => format!("MySQL error {number} ({state})"),
        None => format!("MySQL error {number}"),
    }
}

/// The text, with the server's messages removed if errors are redacted.
pub(crate) fn redact(text: &str) -> Cow<'_, str> {
    if redacts_errors() { redact_until(text, None) } else { Cow::Borrowed(text) }
}

/// [`redact`] for a line of JSON: a message of the server ends with the string that contains it.
pub(crate) fn redact_json(line: &str) -> Cow<'_, str> {
    if redacts_errors() { redact_until(line, Some('"')) } else { Cow::Borrowed(line) }
}

/// Removes each message that follows the number of a server's error. The message ends at an
/// unescaped `end`, or at the end of the text.
fn redact_until(text: &str, end: Option<char>) -> Cow<'_, str> {
    let mut rest = text;
    let mut shown = String::new();
    while let Some(ServerError { start, message, number, state }) = find_server_error(rest) {
        shown.push_str(&rest[..start]);
        shown.push_str(&format_error_number(number, state));
        let message = &rest[message..];
        rest = &message[end.map_or(message.len(), |end| find_string_end(message, end))..];
    }
    if shown.is_empty() && rest.len() == text.len() {
        Cow::Borrowed(text)
    } else {
        Cow::Owned(shown + rest)
    }
}

/// An error of the server in a text. The offsets are in bytes.
struct ServerError<'a> {
    /// The start of the prefix, or of a number without a prefix.
    start: usize,
    /// The start of the server's message.
    message: usize,
    number: &'a str,
    state: Option<&'a str>,
}

/// The first error of the server in a text: `1062 (23000): …`, or a number without a state after
/// the prefix of sqlx.
fn find_server_error(text: &str) -> Option<ServerError<'_>> {
    let bytes = text.as_bytes();
    let mut index = 0;
    while index < bytes.len() {
        if !bytes[index].is_ascii_digit() {
            index += 1;
            continue;
        }
        let digits = bytes[index..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (number, rest) = text[index..].split_at(digits);
        let has_prefix = text[..index].ends_with(SQLX_PREFIX);
        let start = if has_prefix { index - SQLX_PREFIX.len() } else { index };
        let state = rest.strip_prefix(" (").and_then(|rest| rest.get(..5)).filter(|state| {
            state.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase())
                && rest[7..].starts_with("): ")
        });
        if (4..=5).contains(&digits) {
            if state.is_some() {
                return Some(ServerError { start, message: index + digits + 10, number, state });
            }
            if has_prefix && rest.starts_with(": ") {
                return Some(ServerError {
                    start,
                    message: index + digits + 2,
                    number,
                    state: None,
                });
            }
        }
        index += digits;
    }
    None
}

/// The offset of the quote that ends a JSON string, for a text that starts inside the string.
fn find_string_end(text: &str, quote: char) -> usize {
    let mut is_escaped = false;
    for (index, character) in text.char_indices() {
        match character {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            character if character == quote => return index,
            _ => {}
        }
    }
    text.len()
}

/// Text for a terminal. Control characters could move the cursor, change colours or start a new
/// line, so they are escaped.
pub(crate) fn escape_control(text: &str) -> Cow<'_, str> {
    if text.contains(char::is_control) {
        text.chars().fold(String::with_capacity(text.len()), push_escaped).into()
    } else {
        Cow::Borrowed(text)
    }
}

/// [`escape_control`] for a text of this program, which may have several lines.
pub(crate) fn escape_control_lines(text: &str) -> String {
    text.split('\n').map(escape_control).collect::<Vec<_>>().join("\n")
}

/// A number of things, for people: `1 event`, `20,000 events`. Positions are printed without
/// separators, because people copy them into commands and statements.
pub(crate) fn count(number: u64, noun: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{} {noun}{ending}", HumanCount(number))
}

/// A duration, for people, in its largest unit: `40 seconds`, `3 minutes`.
pub(crate) fn duration(seconds: f64) -> String {
    HumanDuration(Duration::try_from_secs_f64(seconds).unwrap_or_default()).to_string()
}

/// A time in UTC as RFC 3339, with all its digits, for programs.
pub(crate) fn timestamp(at: OffsetDateTime) -> String {
    at.format(&Rfc3339).unwrap_or_else(|_| at.to_string())
}

/// A time in UTC to the second, and its age, for people: `2026-11-29T16:09:01Z (3 minutes ago)`.
pub(crate) fn timestamp_with_age(at: OffsetDateTime, now: OffsetDateTime) -> String {
    let to_the_second = timestamp(at.replace_nanosecond(0).unwrap_or(at));
    format!("{to_the_second} ({} ago)", duration((now - at).as_seconds_f64()))
}

fn push_escaped(mut text: String, character: char) -> String {
    if character.is_control() {
        text.extend(character.escape_default());
    } else {
        text.push(character);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_server_error_is_cut_after_its_number() {
        for (text, shown) in [
            (
                "a.toml:7: error returned from database: 1062 (23000): \
                 Duplicate entry 'ann@example.com' for key 'x'",
                "a.toml:7: MySQL error 1062 (23000)",
            ),
            (
                "it failed: 1062 (23000): Duplicate entry 'ann@example.com'",
                "it failed: MySQL error 1062 (23000)",
            ),
            ("error returned from database: 1045: denied to 'ann'@'%'", "MySQL error 1045"),
            ("at 12345 (6 events): nothing", "at 12345 (6 events): nothing"),
            ("2024 (ABCDE) was the year", "2024 (ABCDE) was the year"),
            ("", ""),
        ] {
            assert_eq!(redact_until(text, None), shown);
        }
    }

    #[test]
    fn json_fields_after_a_cut_error_are_kept() {
        let line = [
            r#"{"error":"x: error returned from database: 1062 (23000): entry \"ann\" it\\","#,
            r#""projector":"a@1","last":"1048 (23000): y"}"#,
        ];
        let shown = [
            r#"{"error":"x: MySQL error 1062 (23000)","#,
            r#""projector":"a@1","last":"MySQL error 1048 (23000)"}"#,
        ];
        assert_eq!(redact_until(&line.concat(), Some('"')), shown.concat());
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(escape_control("a\u{1b}[2J\nb\u{9b}é"), "a\\u{1b}[2J\\nb\\u{9b}é");
        assert_eq!(escape_control_lines("a\u{7}\nb"), "a\\u{7}\nb");
    }

    #[test]
    fn one_thing_is_singular_and_counts_have_separators() {
        let counted = [0, 1, 2, 20_000].map(|number| count(number, "event"));
        assert_eq!(counted, ["0 events", "1 event", "2 events", "20,000 events"]);
    }

    #[test]
    fn a_time_is_printed_to_the_second_with_its_age() {
        let at = OffsetDateTime::UNIX_EPOCH + time::Duration::milliseconds(1_750_000_000_123);
        let aged = |seconds| timestamp_with_age(at, at + time::Duration::seconds(seconds));
        assert_eq!(aged(1), "2025-06-15T15:06:40Z (1 second ago)");
        assert_eq!(aged(200), "2025-06-15T15:06:40Z (3 minutes ago)");
        // The clock of the host that recorded the time can be ahead of ours.
        assert_eq!(aged(-5), "2025-06-15T15:06:40Z (0 seconds ago)");
    }

    proptest! {
        #[test]
        fn escaping_leaves_no_control_character_and_never_panics(text in any::<String>()) {
            prop_assert!(!escape_control(&text).contains(char::is_control));
            redact_until(&text, None);
            redact_until(&text, Some('"'));
        }
    }
}
