//! Splits SQL into tokens. The lexer finds where literals and comments begin and end, so that their
//! content is not read as syntax.
//!
//! Why ours: `sqlparser` builds a syntax tree and refuses statements that it does not know but the
//! server does. Here only the ends of literals, comments and names matter.

use super::StatementError;

/// A token. All tokens of a text, joined, are the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token<'s> {
    pub(super) kind: TokenKind,
    /// The offset in the text, in bytes.
    pub(super) at: usize,
    pub(super) text: &'s str,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenKind {
    /// Blanks, or a comment.
    Trivia,
    /// A string literal or a quoted name, with its quotes.
    Quoted,
    /// A keyword, a name or a number.
    Word,
    /// Any other single character.
    Symbol,
}

/// Reads SQL as MySQL and MariaDB do by default, with `ANSI_QUOTES` and `NO_BACKSLASH_ESCAPES` off.
pub(super) struct Lexer<'s> {
    sql: &'s str,
    at: usize,
}

impl<'s> Lexer<'s> {
    pub(super) fn new(sql: &'s str) -> Self {
        Lexer { sql, at: 0 }
    }

    /// The text after the tokens so far.
    pub(super) fn rest(&self) -> &'s str {
        &self.sql[self.at..]
    }

    /// Skips `length` bytes that the caller has read from [`Lexer::rest`].
    pub(super) fn skip(&mut self, length: usize) {
        self.at += length;
    }

    /// The next token; `None` at the end.
    ///
    /// # Errors
    /// If a literal or a comment is never closed, or if some servers execute a comment.
    pub(super) fn next(&mut self) -> Result<Option<Token<'s>>, StatementError> {
        let (at, rest) = (self.at, self.rest());
        let Some(first) = rest.chars().next() else { return Ok(None) };
        let (kind, length) = match first {
            _ if is_blank(first) => (TokenKind::Trivia, span_while(rest, is_blank)),
            '\'' | '"' | '`' => {
                (TokenKind::Quoted, quoted_len(rest).ok_or_else(|| unclosed_error(at, first))?)
            }
            '#' => (TokenKind::Trivia, line_len(rest)),
            '-' if begins_line_comment(rest) => (TokenKind::Trivia, line_len(rest)),
            '/' if rest.starts_with("/*") => (TokenKind::Trivia, block_comment_len(rest, at)?),
            _ if is_word(first) => (TokenKind::Word, span_while(rest, is_word)),
            _ => (TokenKind::Symbol, first.len_utf8()),
        };
        self.at += length;
        Ok(Some(Token { kind, at, text: &rest[..length] }))
    }
}

/// Whether a character may occur in an unquoted name. All characters beyond ASCII may.
pub(super) fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '$') || !c.is_ascii()
}

/// The length in bytes of the longest prefix whose characters all satisfy `holds`.
pub(super) fn span_while(text: &str, holds: impl Fn(char) -> bool) -> usize {
    text.find(|c| !holds(c)).unwrap_or(text.len())
}

fn is_blank(c: char) -> bool {
    c.is_ascii_whitespace() || c == '\x0b'
}

/// Whether a line comment begins. Two dashes without a blank after them are two minus signs:
/// `5--1`.
fn begins_line_comment(rest: &str) -> bool {
    rest.strip_prefix("--").is_some_and(|after| {
        after.chars().next().is_none_or(|c| is_blank(c) || c.is_ascii_control())
    })
}

/// The length of the rest of the line, without its end.
fn line_len(rest: &str) -> usize {
    span_while(rest, |c| c != '\n')
}

fn block_comment_len(rest: &str, at: usize) -> Result<usize, StatementError> {
    // Some servers read the content as SQL and others as a comment, so neither reading is right.
    if rest.starts_with("/*!") || rest.starts_with("/*M!") {
        return Err(StatementError::new(
            at,
            "some servers execute this comment (`/*! … */`): write its SQL outside of a comment, \
             or remove it",
        ));
    }
    let length = rest[2..].find("*/").map(|end| end + 4);
    length.ok_or_else(|| StatementError::new(at, "a comment is never closed: add `*/`"))
}

/// The length of a string literal or quoted name; `None` if it is never closed. A doubled quote
/// belongs to the content. Outside backticks, so does a character after a backslash.
fn quoted_len(rest: &str) -> Option<usize> {
    let bytes = rest.as_bytes();
    let quote = bytes[0];
    let mut at = 1;
    loop {
        match *bytes.get(at)? {
            b'\\' if quote != b'`' => at += 2,
            byte if byte == quote && bytes.get(at + 1) == Some(&quote) => at += 2,
            byte if byte == quote => return Some(at + 1),
            _ => at += 1,
        }
    }
}

fn unclosed_error(at: usize, quote: char) -> StatementError {
    StatementError::new(
        at,
        format!(
            "a `{quote}` is never closed: add the closing `{quote}`, or double it \
             (`{quote}{quote}`) if it is meant as text"
        ),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tokens(sql: &str) -> Result<Vec<(TokenKind, &str)>, StatementError> {
        let mut lexer = Lexer::new(sql);
        let mut all = Vec::new();
        while let Some(token) = lexer.next()? {
            assert_eq!(&sql[token.at..token.at + token.text.len()], token.text);
            all.push((token.kind, token.text));
        }
        Ok(all)
    }

    #[test]
    fn literals_and_comments_end_where_mysql_ends_them() {
        use TokenKind::{Quoted, Trivia};
        for (sql, kind) in [
            ("'it''s'", Quoted),
            (r"'a\'b'", Quoted),
            (r"'ends in a backslash\\'", Quoted),
            (r#""say ""x"", \"y\" ""#, Quoted),
            ("'\"`'", Quoted),
            ("`a``b`", Quoted),
            (r"`no escape\`", Quoted),
            ("'é\\é'", Quoted),
            ("-- a 'quote", Trivia),
            ("--", Trivia),
            ("--\t:x", Trivia),
            ("# :x", Trivia),
            ("/* ' :x ; */", Trivia),
            ("/**/", Trivia),
            ("/*+ a hint */", Trivia),
        ] {
            assert_eq!(tokens(sql), Ok(vec![(kind, sql)]), "{sql}");
        }
    }

    #[test]
    fn two_dashes_without_a_blank_are_two_minus_signs() {
        use TokenKind::{Symbol, Word};
        assert_eq!(
            tokens("5--1"),
            Ok(vec![(Word, "5"), (Symbol, "-"), (Symbol, "-"), (Word, "1")])
        );
    }

    #[test]
    fn a_line_comment_ends_with_its_line() {
        use TokenKind::{Trivia, Word};
        assert_eq!(tokens("-- a\nb"), Ok(vec![(Trivia, "-- a"), (Trivia, "\n"), (Word, "b")]));
        assert_eq!(tokens("#a\nb"), Ok(vec![(Trivia, "#a"), (Trivia, "\n"), (Word, "b")]));
    }

    #[test]
    fn an_unclosed_literal_or_comment_is_refused_where_it_opens() {
        for sql in [
            "x 'a",
            "x \"a",
            "x `a",
            "x 'a''",
            r"x 'a\'",
            r"x 'a\",
            "x /* a",
            "x /*/",
            "x /*! drop */",
            "x /*M! y */",
        ] {
            assert_eq!(tokens(sql).expect_err(sql).at, 2, "{sql}");
        }
    }

    proptest! {
        #[test]
        fn the_tokens_of_any_text_join_to_that_text(
            sql in "([-'\"`\\\\#*/:;?a\n é]|[a-z]{2}|.){0,40}"
        ) {
            if let Ok(tokens) = tokens(&sql) {
                prop_assert_eq!(tokens.into_iter().map(|(_, text)| text).collect::<String>(), sql);
            }
        }
    }
}
