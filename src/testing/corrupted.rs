//! Valid input with a few random edits. Random text fails at a parser's first token; these inputs
//! reach the rest of the parser.

use proptest::prelude::*;
use proptest::sample::{Index, select};

/// Pieces that parsers may mishandle, from every syntax that the program reads.
const PIECES: &[&[u8]] = &[
    b"\"",
    b"'",
    b"\"\"\"",
    b"`",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"{",
    b"}",
    b"[",
    b"]",
    b"[[",
    b",",
    b":",
    b";",
    b"=",
    b"?",
    b".",
    b"..",
    b"#",
    b"--",
    b"/*",
    b"*/",
    b"*",
    b"\n",
    b"\0",
    b" ",
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"18446744073709551615",
    b"18446744073709551616",
    b":payload.a.0?",
    b":position",
    b":metadata.\"",
    b"\xff",
    b"\xc3",
    "é".as_bytes(),
    "\u{feff}".as_bytes(),
    "\u{ffff}".as_bytes(),
    "𝄞".as_bytes(),
];

#[derive(Debug, Clone, Copy)]
enum Edit {
    Insert(&'static [u8]),
    Replace(&'static [u8]),
    Remove,
    Repeat,
    Truncate,
}

/// `valid` with up to four random edits.
pub(crate) fn bytes(valid: &str) -> impl Strategy<Value = Vec<u8>> + use<> {
    let valid = valid.as_bytes().to_vec();
    let edit = prop_oneof![
        3 => select(PIECES).prop_map(Edit::Insert),
        4 => select(PIECES).prop_map(Edit::Replace),
        2 => Just(Edit::Remove),
        2 => Just(Edit::Repeat),
        1 => Just(Edit::Truncate),
    ];
    prop::collection::vec((edit, any::<Index>(), 1usize..40), 0..5).prop_map(move |edits| {
        let mut bytes = valid.clone();
        for (edit, at, length) in edits {
            let start = at.index(bytes.len() + 1);
            let end = bytes.len().min(start + length);
            match edit {
                Edit::Insert(piece) => _ = bytes.splice(start..start, piece.iter().copied()),
                Edit::Replace(piece) => _ = bytes.splice(start..end, piece.iter().copied()),
                Edit::Remove => _ = bytes.drain(start..end),
                Edit::Repeat => bytes.extend_from_within(start..end),
                Edit::Truncate => bytes.truncate(start),
            }
        }
        bytes
    })
}

/// [`bytes`] as text; invalid UTF-8 is replaced.
pub(crate) fn text(valid: &str) -> impl Strategy<Value = String> + use<> {
    bytes(valid).prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}
