//! Finds the values at paths in an event's JSON text, and converts them to values to bind.
//!
//! Why ours: JSONPath crates search a parsed `serde_json::Value`, which holds the whole document
//! and rounds numbers. This reads the text once, with serde_json's own parser, and keeps every
//! digit.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;

use serde::Deserializer as _;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

/// All paths that a projector follows in one document. They are found together, and nothing else of
/// the document is kept in memory.
#[derive(Debug)]
pub(super) struct Paths {
    /// The first node is the document. Each other node comes after its parent.
    nodes: Vec<Node>,
}

/// The index of a node in [`Paths`], and of its text in [`PathValues`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PathId(usize);

/// The children to find in one object or array.
#[derive(Debug, Default)]
struct Node {
    keys: HashMap<Vec<u8>, PathId>,
    /// The children whose key is also an array index.
    elements: HashMap<usize, PathId>,
}

impl Paths {
    pub(super) fn new() -> Self {
        Paths { nodes: vec![Node::default()] }
    }

    /// Adds a path and returns its node. A key that is a number is an index if the value is an
    /// array.
    pub(super) fn add(&mut self, path: &[String]) -> PathId {
        let mut at = PathId(0);
        for key in path {
            at = match self.nodes[at.0].keys.get(key.as_bytes()) {
                Some(place) => *place,
                None => self.add_child(at, key),
            };
        }
        at
    }

    fn add_child(&mut self, parent: PathId, key: &str) -> PathId {
        let place = PathId(self.nodes.len());
        self.nodes.push(Node::default());
        let parent = &mut self.nodes[parent.0];
        parent.keys.insert(key.as_bytes().to_vec(), place);
        // `01` is a key and not an index, so that each element has only one name.
        if let Some(index) = key.parse().ok().filter(|index: &usize| index.to_string() == key) {
            parent.elements.insert(index, place);
        }
        place
    }

    /// Finds the text at each path. If a key occurs twice in an object, the last one counts, as in
    /// MySQL.
    ///
    /// # Errors
    /// If a part of the text that is read is not JSON.
    pub(super) fn find<'e>(&self, text: &'e str) -> Result<PathValues<'e>, serde_json::Error> {
        let mut found = vec![None; self.nodes.len()];
        found[0] = Some(text);
        for (at, node) in self.nodes.iter().enumerate() {
            if let Some(text) = found[at].filter(|_| !node.keys.is_empty()) {
                visit_children(text, ChildVisitor { node, found: &mut found })?;
            }
        }
        Ok(PathValues(found))
    }
}

/// The text found at each node of a [`Paths`]; `None` if it is missing.
#[derive(Debug)]
pub(super) struct PathValues<'e>(Vec<Option<&'e str>>);

impl<'e> PathValues<'e> {
    pub(super) fn get(&self, place: PathId) -> Option<&'e str> {
        self.0[place.0]
    }
}

/// Visits the children of an object or array. A scalar has no children, so a path through it is
/// missing.
fn visit_children<'e>(
    text: &'e str,
    children: ChildVisitor<'_, 'e>,
) -> Result<(), serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    match text.trim_ascii_start().as_bytes().first() {
        Some(b'{') => deserializer.deserialize_map(children)?,
        Some(b'[') => deserializer.deserialize_seq(children)?,
        _ => return Ok(()),
    }
    deserializer.end()
}

/// Records the text of each child to find, and skips all others.
struct ChildVisitor<'p, 'e> {
    node: &'p Node,
    found: &'p mut [Option<&'e str>],
}

impl<'e> Visitor<'e> for ChildVisitor<'_, 'e> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or an array")
    }

    fn visit_map<A: MapAccess<'e>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(wanted) = map.next_key_seed(KeyLookup(self.node))? {
            match wanted {
                Some(place) => self.found[place.0] = Some(map.next_value::<&RawValue>()?.get()),
                None => _ = map.next_value::<IgnoredAny>()?,
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'e>>(self, mut elements: A) -> Result<(), A::Error> {
        for index in 0.. {
            let more = match self.node.elements.get(&index) {
                Some(place) => {
                    let element = elements.next_element::<&RawValue>()?;
                    self.found[place.0] = element.map(RawValue::get);
                    element.is_some()
                }
                None => elements.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                break;
            }
        }
        Ok(())
    }
}

/// Looks up a key without a copy. Reads the key as bytes, because a key that is not looked for may
/// be invalid Unicode.
struct KeyLookup<'p>(&'p Node);

impl<'e> DeserializeSeed<'e> for KeyLookup<'_> {
    type Value = Option<PathId>;

    fn deserialize<D: serde::Deserializer<'e>>(
        self,
        deserializer: D,
    ) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_bytes(self)
    }
}

impl Visitor<'_> for KeyLookup<'_> {
    type Value = Option<PathId>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_bytes<E: serde::de::Error>(self, key: &[u8]) -> Result<Self::Value, E> {
        Ok(self.0.keys.get(key).copied())
    }
}

/// A JSON value to bind.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'e> {
    Null,
    Boolean(bool),
    Signed(i64),
    Unsigned(u64),
    Double(f64),
    /// A string; the literal of a number that no other variant holds exactly, which the column
    /// converts; or the JSON text of an object or array, byte for byte.
    Text(Cow<'e, str>),
}

impl<'e> Value<'e> {
    /// Parses one JSON value.
    ///
    /// # Errors
    /// If the text is a string that is not valid Unicode or not JSON.
    pub(super) fn parse(text: &'e str) -> Result<Self, serde_json::Error> {
        Ok(match text.as_bytes().first() {
            Some(b'n') => Value::Null,
            Some(b't' | b'f') => Value::Boolean(text == "true"),
            Some(b'"') => Value::Text(parse_string(text)?),
            Some(b'{' | b'[') => Value::Text(Cow::Borrowed(text)),
            _ => parse_number(text),
        })
    }
}

fn parse_string(text: &str) -> Result<Cow<'_, str>, serde_json::Error> {
    match text.strip_prefix('"').and_then(|text| text.strip_suffix('"')) {
        Some(inner) if !inner.contains('\\') => Ok(Cow::Borrowed(inner)),
        _ => serde_json::from_str(text).map(Cow::Owned),
    }
}

fn parse_number(literal: &str) -> Value<'_> {
    if let Ok(number) = literal.parse() {
        return Value::Signed(number);
    }
    if let Ok(number) = literal.parse() {
        return Value::Unsigned(number);
    }
    let double = literal.parse().ok().filter(|number: &f64| number.is_finite());
    match double {
        // Like this formatting, MySQL writes a double with the fewest digits that identify it.
        Some(number) if Decimal::parse(literal) == Decimal::parse(&format!("{number:e}")) => {
            Value::Double(number)
        }
        _ => Value::Text(Cow::Borrowed(literal)),
    }
}

/// A number as `0.digits` times ten to the power of `exponent`, without a sign. The digits have no
/// zeros at either end.
#[derive(Debug, PartialEq, Eq)]
struct Decimal {
    digits: String,
    exponent: i64,
}

impl Decimal {
    /// `None` if the exponent does not fit 64 bits, far beyond any double.
    fn parse(literal: &str) -> Option<Decimal> {
        let (mantissa, exponent) = literal.split_once(['e', 'E']).unwrap_or((literal, "0"));
        let mantissa = mantissa.trim_start_matches('-');
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let all = format!("{whole}{fraction}");
        let digits = all.trim_start_matches('0');
        if digits.is_empty() {
            return Some(Decimal { digits: String::new(), exponent: 0 });
        }
        let point =
            i64::try_from(whole.len()).ok()? - i64::try_from(all.len() - digits.len()).ok()?;
        let exponent = exponent.parse::<i64>().ok()?.checked_add(point)?;
        Some(Decimal { digits: digits.trim_end_matches('0').to_owned(), exponent })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::corrupted;

    fn find<'e>(text: &'e str, path: &str) -> Option<&'e str> {
        let keys: Vec<String> =
            path.split('.').filter(|key| !key.is_empty()).map(Into::into).collect();
        let mut paths = Paths::new();
        // Other paths beside it and below it must not change the result.
        paths.add(&["z".into()]);
        let place = paths.add(&keys);
        paths.add(&[keys, vec!["below".into()]].concat());
        paths.find(text).expect(text).get(place)
    }

    #[test]
    fn a_path_finds_the_original_text_inside_objects_and_arrays() {
        for (text, path, expected) in [
            (r#"{"a":1}"#, "a", Some("1")),
            (r#" { "a" : { "b" : 1.50 } } "#, "a.b", Some("1.50")),
            (r#"{"a":{"y":1, "x":[ 2 ]}}"#, "a", Some(r#"{"y":1, "x":[ 2 ]}"#)),
            (r#"{"a":null}"#, "a", Some("null")),
            (r#"{"a":null}"#, "a.b", None),
            (r#"{"a":{}}"#, "a.b", None),
            (r#"{"a":1}"#, "a.b", None),
            (r#"{"a":"b"}"#, "a.b", None),
            (r#"{"a":1}"#, "A", None),
            (r#"{"a":1}"#, "b", None),
            (r#"{"a":[10,20]}"#, "a.1", Some("20")),
            (r#"{"a":[10,20]}"#, "a.2", None),
            (r#"{"a":[10,20]}"#, "a.01", None),
            (r#"{"a":[10,20]}"#, "a.99999999999999999999", None),
            (r#"{"a":[10,20]}"#, "a.b", None),
            (r#"{"a":{"1":"key"}}"#, "a.1", Some(r#""key""#)),
            (r#"[[1,2],[3]]"#, "1.0", Some("3")),
            (r#"{"a":1,"a":2}"#, "a", Some("2")),
            (r#"{"a":{"b":1},"a":{"c":2}}"#, "a.b", None),
            (r#"{"\u0061":1}"#, "a", Some("1")),
            (r#"{"größe":1}"#, "größe", Some("1")),
            (r#"{"\ud800":1,"a":2}"#, "a", Some("2")),
            ("3", "a", None),
            ("null", "a", None),
            ("[]", "0", None),
            ("7", "", Some("7")),
        ] {
            assert_eq!(find(text, path), expected, "{path} in {text}");
        }
    }

    #[test]
    fn invalid_json_is_an_error_and_not_a_missing_path() {
        let mut paths = Paths::new();
        paths.add(&["a".into()]);
        for text in ["{", r#"{"a":1"#, r#"{"a":1} x"#, "{'a':1}", "[1,"] {
            assert!(paths.find(text).is_err(), "{text}");
        }
    }

    #[test]
    fn each_json_value_binds_as_its_own_type() {
        let text = |text: &'static str| Value::Text(text.into());
        for (json, value) in [
            ("null", Value::Null),
            ("true", Value::Boolean(true)),
            ("false", Value::Boolean(false)),
            ("0", Value::Signed(0)),
            ("-9223372036854775808", Value::Signed(i64::MIN)),
            ("9223372036854775808", Value::Unsigned(1 << 63)),
            ("18446744073709551615", Value::Unsigned(u64::MAX)),
            ("18446744073709551616", text("18446744073709551616")),
            ("-9223372036854775809", text("-9223372036854775809")),
            ("0.1", Value::Double(0.1)),
            ("-12.50", Value::Double(-12.5)),
            ("1e3", Value::Double(1000.0)),
            ("100000000000000000000", Value::Double(1e20)),
            ("0.0000", Value::Double(0.0)),
            ("5e-324", Value::Double(5e-324)),
            ("0.10000000000000000001", text("0.10000000000000000001")),
            ("12345678901234567.89", text("12345678901234567.89")),
            ("1e400", text("1e400")),
            ("1e-400", text("1e-400")),
            ("1e99999999999999999999", text("1e99999999999999999999")),
            (r#""plain""#, text("plain")),
            (r#""a\n\"b\" \u00e9 \ud83d\ude00""#, text("a\n\"b\" é 😀")),
            (r#""""#, text("")),
            (r#"{"b": 1, "a":1.0}"#, text(r#"{"b": 1, "a":1.0}"#)),
            ("[ 1 ]", text("[ 1 ]")),
        ] {
            assert_eq!(Value::parse(json).expect(json), value, "{json}");
        }
        assert!(Value::parse(r#""\ud800""#).is_err(), "a lone surrogate cannot be bound");
    }

    const NUMBER: &str = "-?(0|[1-9][0-9]{0,24})(\\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?";

    proptest! {
        #[test]
        fn a_number_binds_without_losing_a_digit(literal in NUMBER) {
            let bound = match Value::parse(&literal).expect("it is a number") {
                Value::Signed(number) => number.to_string(),
                Value::Unsigned(number) => number.to_string(),
                Value::Double(number) => format!("{number:e}"),
                Value::Text(text) => text.into_owned(),
                other => panic!("{other:?}"),
            };
            prop_assert_eq!(Decimal::parse(&bound), Decimal::parse(&literal));
        }

        #[test]
        fn every_double_binds_as_a_double(number in proptest::num::f64::NORMAL) {
            let literal = format!("{number:e}");
            prop_assert_eq!(Value::parse(&literal).expect("a number"), Value::Double(number));
        }

        /// A value that is found in a corrupted payload is a slice of that payload.
        #[test]
        fn a_value_found_in_corrupted_json_is_a_slice_of_it(
            text in corrupted::text(
                r#"{"a":{"0":[1,{"b":"\u00e9"}],"c":-2.50},"a":[[null,true]]}"#,
            ),
        ) {
            let mut paths = Paths::new();
            let places = [&["a"][..], &["a", "0"], &["a", "0", "1", "b"]]
                .map(|path| paths.add(&path.iter().map(|&key| key.to_owned()).collect::<Vec<_>>()));
            let Ok(found) = paths.find(&text) else { return Ok(()) };
            for part in places.into_iter().filter_map(|place| found.get(place)) {
                prop_assert!(text.contains(part));
                if let Ok(Value::Text(bound)) = Value::parse(part) {
                    prop_assert!(bound.len() <= part.len());
                }
            }
        }

        #[test]
        fn no_text_makes_the_search_panic(text in "([{}\\[\\],:\"\\\\a01 ]|.){0,40}") {
            let mut paths = Paths::new();
            paths.add(&["a".into(), "0".into()]);
            let _ = paths.find(&text);
            let _ = Value::parse(&text);
        }
    }
}
