//! Text that leaves the process: for a terminal, a log, an alert, the ledger.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};

/// How sqlx introduces what the server said.
const SQLX_PREFIX: &str = "error returned from database: ";

static REDACTS_ERRORS: AtomicBool = AtomicBool::new(false);

/// From now on errors of the server are shown by their numbers only: what the server says of a row
/// may name its values.
pub(crate) fn redact_errors() {
    REDACTS_ERRORS.store(true, Ordering::Relaxed);
}

/// Whether errors of the server are shown by their numbers only.
pub(crate) fn redacts_errors() -> bool {
    REDACTS_ERRORS.load(Ordering::Relaxed)
}

/// An error of the server by its numbers.
pub(crate) fn format_error_number(number: &str, state: Option<&str>) -> String {
    match state {
        Some(state) => format!("MySQL error {number} ({state})"),
        None => format!("MySQL error {number}"),
    }
}

/// Text as it may be shown: where errors are kept to their numbers, without what a server said
/// after one.
pub(crate) fn redact(text: &str) -> Cow<'_, str> {
    match redacts_errors() {
        true => redact_until(text, None),
        false => Cow::Borrowed(text),
    }
}

/// [`redact`], for a line of JSON: what a server said ends with the string that it is in.
pub(crate) fn redact_json(line: &str) -> Cow<'_, str> {
    match redacts_errors() {
        true => redact_until(line, Some('"')),
        false => Cow::Borrowed(line),
    }
}

/// Without what follows the number of a server's error, up to `end` where it is not escaped, or to
/// the end of the text.
fn redact_until(text: &str, end: Option<char>) -> Cow<'_, str> {
    let mut rest = text;
    let mut shown = String::new();
    while let Some(ServerError { start, message, number, state }) = find_server_error(rest) {
        shown.push_str(&rest[..start]);
        shown.push_str(&format_error_number(number, state));
        let said = &rest[message..];
        rest = &said[end.map_or(said.len(), |end| find_string_end(said, end))..];
    }
    match shown.is_empty() && rest.len() == text.len() {
        true => Cow::Borrowed(text),
        false => Cow::Owned(shown + rest),
    }
}

/// Where an error of the server stands in a text.
struct ServerError<'a> {
    /// Of its introduction, or of its number.
    start: usize,
    /// Of what the server said.
    message: usize,
    number: &'a str,
    state: Option<&'a str>,
}

/// The first error of the server: `1062 (23000): …`, or, introduced by sqlx, without a state.
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
        let is_introduced = text[..index].ends_with(SQLX_PREFIX);
        let start = if is_introduced { index - SQLX_PREFIX.len() } else { index };
        let state = rest.strip_prefix(" (").and_then(|rest| rest.get(..5)).filter(|state| {
            state.bytes().all(|byte| byte.is_ascii_digit() || byte.is_ascii_uppercase())
                && rest[7..].starts_with("): ")
        });
        if (4..=5).contains(&digits) {
            if state.is_some() {
                return Some(ServerError { start, message: index + digits + 10, number, state });
            }
            if is_introduced && rest.starts_with(": ") {
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

/// Where a string of JSON ends that goes on here.
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

/// Text for a terminal: control characters, which could move the cursor, change colours or begin a
/// line of their own, are shown by their numbers.
pub(crate) fn escape_control(text: &str) -> Cow<'_, str> {
    match text.contains(char::is_control) {
        false => Cow::Borrowed(text),
        true => text.chars().fold(String::with_capacity(text.len()), push_escaped).into(),
    }
}

/// [`escape_control`], for text of ours that may have several lines.
pub(crate) fn escape_control_lines(text: &str) -> String {
    text.split('\n').map(escape_control).collect::<Vec<_>>().join("\n")
}

fn push_escaped(mut text: String, character: char) -> String {
    match character.is_control() {
        true => text.extend(character.escape_default()),
        false => text.push(character),
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
                "a.toml:7: error returned from database: 1062 (23000): Duplicate entry 'ann@example.com' for key 'x'",
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
        let line = r#"{"error":"x: error returned from database: 1062 (23000): entry \"ann\" it\\","projector":"a@1","last":"1048 (23000): y"}"#;
        assert_eq!(
            redact_until(line, Some('"')),
            r#"{"error":"x: MySQL error 1062 (23000)","projector":"a@1","last":"MySQL error 1048 (23000)"}"#
        );
    }

    #[test]
    fn control_characters_are_escaped() {
        assert_eq!(escape_control("a\u{1b}[2J\nb\u{9b}é"), "a\\u{1b}[2J\\nb\\u{9b}é");
        assert_eq!(escape_control_lines("a\u{7}\nb"), "a\\u{7}\nb");
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
