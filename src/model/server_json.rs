//! Rewrites JSON that a server accepts and serde_json refuses, so that both accept it.
//!
//! The differences were found by trial with `json_valid` on MariaDB 10.11 and MySQL 9.7. MariaDB
//! accepts `\` before any character, and reads that character as itself (`\'`, `\v`, `\x41`). It
//! also accepts numbers that end early (`1.`, `1.e5`, `1e`, `-`). MySQL accepts anything after a
//! NUL that follows the document. Both refuse leading zeros, `.5`, `+1`, NaN, lone surrogates and
//! raw control characters.
//!
//! Why ours: JSON5 parsers and the like accept other deviations than the two servers do.

/// The document for serde_json; `None` if it needs no change.
///
/// A number that ends early has the value of its digits (`1.` is 1). A number without a value
/// (`1e`, `-`) becomes a string, because the server's `json_value` returns it as text.
pub(crate) fn to_strict(text: &str) -> Option<String> {
    let mut written = String::with_capacity(text.len() + 8);
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let length = match c {
            '\0' => break,
            '"' => write_string(rest, &mut written),
            '-' | '0'..='9' => write_number(rest, &mut written),
            _ => {
                written.push(c);
                c.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    (written != text).then_some(written)
}

/// Writes the string at the start of `text`, and returns its length in bytes.
fn write_string(text: &str, written: &mut String) -> usize {
    written.push('"');
    let mut characters = text.char_indices().skip(1);
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => {
                written.push('"');
                return at + 1;
            }
            '\\' => match characters.next() {
                Some((_, escaped @ ('"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' | 'u'))) => {
                    written.extend(['\\', escaped])
                }
                Some((_, plain)) => written.push(plain),
                None => written.push('\\'),
            },
            _ => written.push(c),
        }
    }
    text.len()
}

/// Writes the number at the start of `text`, and returns its length in bytes.
fn write_number(text: &str, written: &mut String) -> usize {
    let length = text
        .find(|c: char| !matches!(c, '0'..='9' | '+' | '-' | '.' | 'e' | 'E'))
        .unwrap_or(text.len());
    let literal = &text[..length];
    let (mantissa, exponent) = match literal.find(['e', 'E']) {
        Some(at) => literal.split_at(at),
        None => (literal, ""),
    };
    let has_value = mantissa != "-"
        && (exponent.is_empty() || exponent.ends_with(|c: char| c.is_ascii_digit()));
    if !has_value {
        written.extend(["\"", literal, "\""]);
    } else if mantissa.ends_with('.') {
        written.extend([mantissa, "0", exponent]);
    } else {
        written.push_str(literal);
    }
    length
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn json_that_only_a_server_accepts_is_rewritten_for_serde_json() {
        for (text, expected) in [
            (r#"{"name":"O\'Brien"}"#, r#"{"name":"O'Brien"}"#),
            (r#"["\v","\x41","\é","\"\\\/\b\u00e9"]"#, r#"["v","x41","é","\"\\\/\b\u00e9"]"#),
            (r#"{"\x61":1}"#, r#"{"x61":1}"#),
            ("[1.,-2.,0.e1,1.E+5,3.5]", "[1.0,-2.0,0.0e1,1.0E+5,3.5]"),
            ("[-,1e,1.5e+,-1E-]", r#"["-","1e","1.5e+","-1E-"]"#),
            ("{\"a\":\"b\"} \0 anything \"", "{\"a\":\"b\"} "),
        ] {
            assert_eq!(to_strict(text).as_deref(), Some(expected), "{text}");
            serde_json::from_str::<serde_json::Value>(expected).expect(expected);
        }
    }

    proptest! {
        #[test]
        fn json_that_serde_json_reads_is_unchanged(
            text in "\\[(\"([a-zé]|\\\\[\"\\\\/bfnrt]|\\\\u00e9){0,5}\"\
                |-?(0|[1-9][0-9]{0,3})(\\.[0-9]{1,3})?([eE][+-]?[0-9]{1,2})?|true|null)\
                ( ?, ?(\"x\"|7))?\\]"
        ) {
            prop_assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{}", text);
            prop_assert_eq!(to_strict(&text), None);
        }

        #[test]
        fn no_text_makes_the_rewriter_panic(text in "([{}\\[\\],:\"\\\\a01.e+\\- \u{0}]|.){0,40}") {
            let _ = to_strict(&text);
        }
    }
}
