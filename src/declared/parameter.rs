//! Parses the parameters of declared statements: `:position`, `:payload.a.b?`.

use super::StatementError;
use super::cast::Cast;
use super::lexer::{is_word, span_while};
use crate::model::spelling::nearest;

/// The value to bind to one parameter of a statement.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Parameter {
    Position,
    EventId,
    StreamId,
    StreamVersion,
    EventType,
    RecordedAt,
    Json(JsonParameter),
}

/// The payload, the metadata, or a value at a path in one of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct JsonParameter {
    pub(super) document: Document,
    /// The keys of the path. An empty path means the whole text.
    pub(super) path: Vec<String>,
    /// Whether a missing value binds as null. Otherwise it breaks the projector.
    pub(super) is_optional: bool,
    /// How to convert the value; `None` binds it as it is.
    pub(super) cast: Option<Cast>,
    /// The parameter as the statement has it, without its `?`.
    pub(super) written: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Document {
    Payload,
    Metadata,
}

impl Document {
    pub(super) fn name(self) -> &'static str {
        match self {
            Document::Payload => "payload",
            Document::Metadata => "metadata",
        }
    }
}

const NAMES: [&str; 8] = [
    "position",
    "event_id",
    "stream_id",
    "stream_version",
    "event_type",
    "recorded_at",
    "payload",
    "metadata",
];

/// The maximum number of keys in a path. The JSON decoders of this program refuse deeper nesting,
/// too.
const MAX_KEYS: usize = 100;

impl Parameter {
    /// Parses the parameter at the start of `text`, which begins with a colon. Returns the
    /// parameter and its length in bytes. `None` if no name follows the colon, which then is part
    /// of the SQL.
    ///
    /// # Errors
    /// An unknown name or an ambiguous path, with its offset in `text`.
    pub(super) fn parse(text: &str) -> Result<Option<(Parameter, usize)>, StatementError> {
        let name = &text[1..1 + span_while(&text[1..], is_word)];
        if name.starts_with(|c: char| c.is_ascii_digit() || c == '$') || name.is_empty() {
            return Ok(None);
        }
        let column =
            |parameter| check_column_end(text, name).map(|length| Some((parameter, length)));
        match name {
            "position" => column(Parameter::Position),
            "event_id" => column(Parameter::EventId),
            "stream_id" => column(Parameter::StreamId),
            "stream_version" => column(Parameter::StreamVersion),
            "event_type" => column(Parameter::EventType),
            "recorded_at" => column(Parameter::RecordedAt),
            "payload" => parse_json_parameter(Document::Payload, text).map(Some),
            "metadata" => parse_json_parameter(Document::Metadata, text).map(Some),
            _ => Err(StatementError::new(0, unknown_parameter(name))),
        }
    }
}

fn unknown_parameter(name: &str) -> String {
    let known = NAMES.map(|name| format!("`:{name}`")).join(", ");
    let hint =
        nearest(name, &NAMES).map(|near| format!("did you mean `:{near}`? ")).unwrap_or_default();
    format!(
        "unknown parameter `:{name}`: {hint}the parameters are {known}, and paths like \
         `:payload.amount`"
    )
}

fn check_column_end(text: &str, name: &str) -> Result<usize, StatementError> {
    let length = 1 + name.len();
    match text[length..].chars().next() {
        Some('.') => Err(StatementError::new(
            0,
            format!("`:{name}` cannot have a path: only `:payload` and `:metadata` are JSON"),
        )),
        Some('?') => {
            Err(StatementError::new(0, format!("`:{name}` is never missing: remove the `?`")))
        }
        _ => Ok(length),
    }
}

fn parse_json_parameter(
    document: Document,
    text: &str,
) -> Result<(Parameter, usize), StatementError> {
    let mut length = 1 + document.name().len();
    let mut path = Vec::new();
    while text[length..].starts_with('.') {
        let (key, key_length) = parse_key(&text[length + 1..]).map_err(|reason| {
            StatementError::new(0, format!("the path `{}.` {reason}", &text[..length]))
        })?;
        path.push(key);
        length += 1 + key_length;
    }
    let written = text[..length].to_owned();
    if path.len() > MAX_KEYS {
        return Err(StatementError::new(
            0,
            format!("this path has {} keys: at most {MAX_KEYS} are allowed", path.len()),
        ));
    }
    let is_optional = text[length..].starts_with('?');
    let mut end = length + usize::from(is_optional);
    let cast = parse_cast(&text[end..])?;
    let written = match cast {
        Some((name, _)) => {
            end += 1 + name.len();
            format!("{written}|{name}")
        }
        None => written,
    };
    let cast = cast.map(|(_, cast)| cast);
    check_end(&written, &text[end..], is_optional || cast.is_some(), !path.is_empty())?;
    Ok((Parameter::Json(JsonParameter { document, path, is_optional, cast, written }), end))
}

/// Parses `|datetime` at the start of `text`. `||` and a `|` that no name follows are operators.
fn parse_cast(text: &str) -> Result<Option<(&'static str, Cast)>, StatementError> {
    let Some(after) = text.strip_prefix('|') else { return Ok(None) };
    let name = &after[..span_while(after, is_word)];
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Ok(None);
    }
    if let Some(cast) = Cast::ALL.into_iter().find(|(known, _)| *known == name) {
        return Ok(Some(cast));
    }
    let known = Cast::ALL.map(|(known, _)| known);
    let hint =
        nearest(name, &known).map(|near| format!("did you mean `|{near}`? ")).unwrap_or_default();
    let known = known.map(|known| format!("`|{known}`")).join(", ");
    Err(StatementError::new(
        0,
        format!(
            "unknown cast `|{name}`: {hint}the casts are {known}; for the operator, put a blank \
             before the `|`"
        ),
    ))
}

/// Parses one key of a path, and returns it with its length in bytes.
fn parse_key(text: &str) -> Result<(String, usize), String> {
    if text.starts_with('"') {
        return parse_quoted_key(text)
            .ok_or_else(|| "has a quoted key that is never closed: add `\"`".into());
    }
    let word = &text[..span_while(text, is_word)];
    if word.is_empty() {
        return Err("ends in a dot: add a key, an array index, or a key in double quotes".into());
    }
    // Other keys must be quoted, because their end would be ambiguous: keys with letters beyond
    // ASCII, and keys that begin with a digit but are not numbers.
    let plain = word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    let number = word.bytes().all(|b| b.is_ascii_digit());
    if !plain || (word.starts_with(|c: char| c.is_ascii_digit()) && !number) {
        return Err(format!("has the key {word}, which must be quoted: `\"{word}\"`"));
    }
    Ok((word.to_owned(), word.len()))
}

/// Parses a quoted key. A doubled quote stands for one quote; no other character is special.
fn parse_quoted_key(text: &str) -> Option<(String, usize)> {
    let mut key = String::new();
    let mut at = 1;
    loop {
        let end = at + text[at..].find('"')?;
        key.push_str(&text[at..end]);
        if !text[end + 1..].starts_with('"') {
            return Some((key, end + 1));
        }
        key.push('"');
        at = end + 2;
    }
}

/// Refuses a parameter that would be read differently than it looks.
fn check_end(
    written: &str,
    after: &str,
    is_optional: bool,
    has_path: bool,
) -> Result<(), StatementError> {
    let mut following = after.chars();
    let (next, second) = (following.next(), following.next());
    let reason = match next {
        Some('.' | '?') => {
            format!("`{written}` must end with its `?`: nothing can follow the `?`")
        }
        Some(c) if is_word(c) => format!("`{written}` runs into `{c}`: put a space between them"),
        // `:payload.odd-key` would subtract a column from a value.
        Some('-')
            if has_path
                && !is_optional
                && second.is_some_and(|c| is_word(c) && !c.is_ascii_digit()) =>
        {
            let (front, last) = written.rsplit_once('.').unwrap_or((written, ""));
            let word = &after[..span_while(after, |c| is_word(c) || c == '-')];
            format!(
                "`{written}{word}` can be read in two ways: quote the key \
                 (`{front}.\"{}{word}\"`), or put a space before the minus",
                last.trim_matches('"')
            )
        }
        _ => return Ok(()),
    };
    Err(StatementError::new(0, reason))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::corrupted;

    fn payload(path: &[&str], is_optional: bool) -> (Document, Vec<String>, bool) {
        (Document::Payload, path.iter().map(|key| (*key).to_owned()).collect(), is_optional)
    }

    #[test]
    fn a_path_has_keys_indexes_and_quoted_keys_and_may_be_optional() {
        for (text, length, expected) in [
            (":payload", 8, payload(&[], false)),
            (":payload?", 9, payload(&[], true)),
            (":payload,", 8, payload(&[], false)),
            (":payload.a.b_2)", 14, payload(&["a", "b_2"], false)),
            (":payload.items.0.price? ", 23, payload(&["items", "0", "price"], true)),
            (":payload.a-1", 10, payload(&["a"], false)),
            (":payload.a - b", 10, payload(&["a"], false)),
            (":payload.a?-b", 11, payload(&["a"], true)),
            (":payload.\"odd key\".x", 20, payload(&["odd key", "x"], false)),
            (":payload.\"a\"\"b\"", 15, payload(&["a\"b"], false)),
            (":payload.\"\"", 11, payload(&[""], false)),
            (":payload.\"straße.1\"?", 21, payload(&["straße.1"], true)),
        ] {
            let Some((Parameter::Json(read), read_length)) = Parameter::parse(text).expect(text)
            else {
                panic!("{text} is not a JSON parameter")
            };
            assert_eq!((read.document, read.path, read.is_optional), expected, "{text}");
            assert_eq!(read_length, length, "{text}");
            assert_eq!(read.written, text[..length].trim_end_matches('?'), "{text}");
        }
    }

    #[test]
    fn a_cast_follows_the_path_and_an_operator_does_not() {
        for (text, length, cast) in [
            (":payload.at|datetime,", 20, Some(Cast::DateTime)),
            (":payload.at?|date)", 17, Some(Cast::Date)),
            (":metadata.t|unix_seconds", 24, Some(Cast::UnixSeconds)),
            (":payload.t|unix_milliseconds ", 28, Some(Cast::UnixMilliseconds)),
            (":payload.a||b", 10, None),
            (":payload.a|1", 10, None),
            (":payload.a |date", 10, None),
            (":payload.a|(1)", 10, None),
        ] {
            let Some((Parameter::Json(read), read_length)) = Parameter::parse(text).expect(text)
            else {
                panic!("{text} is not a JSON parameter")
            };
            assert_eq!((read.cast, read_length), (cast, length), "{text}");
            assert_eq!(read.written, text[..length].replace('?', ""), "{text}");
        }
    }

    #[test]
    fn every_documented_parameter_name_is_accepted() {
        for name in NAMES {
            let (_, length) = Parameter::parse(&format!(":{name} ")).expect(name).expect(name);
            assert_eq!(length, 1 + name.len());
        }
    }

    #[test]
    fn a_colon_without_a_name_is_left_alone() {
        for text in [":", ": position", ":30", ":$a", ":'x'", ":-)"] {
            assert_eq!(Parameter::parse(text), Ok(None), "{text}");
        }
    }

    #[test]
    fn an_invalid_parameter_is_refused_with_advice() {
        for (text, reason) in [
            (":positon", "did you mean `:position`?"),
            (":Payload.x", "did you mean `:payload`?"),
            (":amount", "the parameters are `:position`, `:event_id`"),
            (":größe", "unknown parameter `:größe`"),
            (":position?", "never missing: remove the `?`"),
            (":stream_id.a", "only `:payload` and `:metadata` are JSON"),
            (":payload.", "ends in a dot"),
            (":payload.a.", "ends in a dot"),
            (":payload..a", "ends in a dot"),
            (":payload.-a", "ends in a dot"),
            (":payload.a?.b", "nothing can follow the `?`"),
            (":payload.a??", "nothing can follow the `?`"),
            (":payload.a?b", "put a space between"),
            (":payload.1a", "must be quoted: `\"1a\"`"),
            (":payload.straße", "must be quoted: `\"straße\"`"),
            (":payload.a$b", "must be quoted"),
            (":payload.\"a", "never closed"),
            (":payload.\"a\"b", "put a space between"),
            (":payload.odd-key", "quote the key (`:payload.\"odd-key\"`)"),
            (":payload.at|datetim", "did you mean `|datetime`?"),
            (":payload.at|column", "put a blank before the `|`"),
            (":payload.at|datetime?", "nothing can follow"),
        ] {
            let error = Parameter::parse(text).expect_err(text);
            assert!(error.reason.contains(reason), "{text}: {}", error.reason);
        }
        let deep = format!(":payload{}", ".a".repeat(MAX_KEYS + 1));
        assert!(Parameter::parse(&deep).expect_err("too deep").reason.contains("at most 100"));
    }

    proptest! {
        /// A corrupted parameter is refused, or everything read from it is a slice of its text.
        #[test]
        fn a_corrupted_parameter_is_refused_or_a_slice_of_its_text(
            rest in corrupted::text("payload.items.0.\"odd \"\"key\"\"\".price? + 1"),
        ) {
            let text = format!(":{rest}");
            match Parameter::parse(&text) {
                Ok(Some((parameter, length))) => {
                    prop_assert!(
                        length > 1 && text.is_char_boundary(length),
                        "{length} in {text:?}"
                    );
                    if let Parameter::Json(read) = parameter {
                        prop_assert!(read.path.iter().map(String::len).sum::<usize>() < length);
                        prop_assert!(text[..length].replace('?', "").starts_with(&read.written.replace('?', "")));
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    prop_assert!(text.is_char_boundary(error.at), "{} in {text:?}", error.at)
                }
            }
        }
    }
}
