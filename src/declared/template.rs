//! The text of a statement, with a literal in place of each parameter.
//!
//! Statements are sent as text and not prepared. A prepared statement costs more than it saves:
//!
//! - MySQL (since 8.0.22) derives the type of a parameter from its place in the statement and from
//!   the value of its first execution, and converts later values to that type. Each combination of
//!   types would need a statement of its own, and ten numbers that are sometimes whole have 1,024.
//! - A connection keeps a limited number of prepared statements, and all connections share the
//!   server's `max_prepared_stmt_count`. Closing one costs 40 ms ([`super::packet`] says why).
//! - Text statements can be sent together, in one round trip. MySQL executes an insert of many rows
//!   five times as fast as text.
//!
//! The effect of a statement therefore depends on its arguments alone. In an expression, a literal
//! is wrapped so that it has the type of its class in every place: `cast(1 as signed)`. A literal
//! that is alone as a value of an inserted row takes its type from the column.

use std::ops::Range;

use super::lexer::{Token, TokenKind};
use super::statement::tokenize;

/// The types of SQL values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Null,
    Signed,
    Unsigned,
    Double,
    Text,
    Date,
    Time,
}

impl Class {
    /// The texts around a value of this class in an expression. They begin with a blank, so that
    /// the value does not join the word before it.
    fn wrapping(self) -> (&'static str, &'static str) {
        match self {
            Class::Null => (" ", ""),
            Class::Signed => (" cast(", " as signed)"),
            Class::Unsigned => (" cast(", " as unsigned)"),
            Class::Double => (" (", ")"),
            // `'text'` alone would join a text before it, and `date 'text'` is a date.
            Class::Text => (" concat(", ")"),
            Class::Date => (" cast(", " as date)"),
            Class::Time => (" cast(", " as datetime(6))"),
        }
    }
}

/// The kind of place of a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ParameterPlace {
    /// Alone as a value of a row: `values (?, 1)`.
    Row,
    /// In an expression.
    Expression,
    /// Where the grammar allows only a whole number: `limit ?`.
    Number,
}

/// A statement that has `?` for its parameters.
#[derive(Debug)]
pub(super) struct Template {
    sql: Box<str>,
    /// The offset of each `?` in the text, in bytes, and its kind of place.
    places: Box<[(usize, ParameterPlace)]>,
}

impl Template {
    pub(super) fn new(sql: String) -> Self {
        let places = find_parameters(&sql);
        Template { sql: sql.into(), places: places.into() }
    }

    pub(super) fn sql(&self) -> &str {
        &self.sql
    }

    /// Appends a part of the statement to `text`, with the output of `write` in place of each
    /// parameter. The part contains all parameters.
    ///
    /// # Errors
    /// The first error of `write`.
    pub(super) fn render<E>(
        &self,
        part: Range<usize>,
        text: &mut String,
        mut write: impl FnMut(usize, ParameterPlace, &mut String) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut copied = part.start;
        for (index, (at, place)) in self.places.iter().enumerate() {
            text.push_str(&self.sql[copied..*at]);
            write(index, *place, text)?;
            copied = at + 1;
        }
        text.push_str(&self.sql[copied..part.end]);
        Ok(())
    }
}

/// Writes a literal in place of a parameter, wrapped as its class and place require.
pub(super) fn write_typed(class: Class, place: ParameterPlace, literal: &str, text: &mut String) {
    // MySQL drops the fraction of a time in a text column, unless the time has an explicit type.
    let is_typed =
        place == ParameterPlace::Expression || (place, class) == (ParameterPlace::Row, Class::Time);
    let (before, after) = if is_typed { class.wrapping() } else { ("", "") };
    text.push_str(before);
    text.push_str(literal);
    text.push_str(after);
}

/// Functions that take a number or a parameter, and no expression.
const NUMBER_FUNCTIONS: &[&str] = &["lag", "lead", "nth_value", "ntile"];

/// The offset of each `?`, in bytes, and its kind of place.
fn find_parameters(sql: &str) -> Vec<(usize, ParameterPlace)> {
    let tokens = tokenize(sql);
    let is = |at: usize, word: &str| {
        tokens.get(at).is_some_and(|token| token.text.eq_ignore_ascii_case(word))
    };
    let in_rows = find_row_parameters(&tokens);
    let mut calls: Vec<usize> = Vec::new();
    let mut places = Vec::new();
    for (index, token) in tokens.iter().enumerate() {
        match token.text {
            "(" => calls.push(index),
            ")" => _ = calls.pop(),
            "?" => {
                let before = |steps: usize, word: &str| {
                    index.checked_sub(steps).is_some_and(|at| is(at, word))
                };
                let is_second = before(1, ",") && before(3, "limit");
                let is_argument =
                    calls.last().and_then(|open| open.checked_sub(1)).is_some_and(|name| {
                        NUMBER_FUNCTIONS.iter().any(|function| is(name, function)) && before(1, ",")
                            || is(name, "ntile")
                    });
                let place = if before(1, "limit") || before(1, "offset") || is_second || is_argument
                {
                    ParameterPlace::Number
                } else if in_rows.contains(&index) {
                    ParameterPlace::Row
                } else {
                    ParameterPlace::Expression
                };
                places.push((token.at, place));
            }
            _ => {}
        }
    }
    places
}

/// The indexes of the `?` tokens that are alone as a value in a row of `insert … values (…), (…)`.
fn find_row_parameters(tokens: &[Token<'_>]) -> Vec<usize> {
    let mut found = Vec::new();
    let is_word = |at: usize, words: &[&str]| {
        tokens.get(at).is_some_and(|token: &Token<'_>| {
            token.kind == TokenKind::Word
                && words.iter().any(|word| token.text.eq_ignore_ascii_case(word))
        })
    };
    if !is_word(0, &["insert", "replace"]) {
        return found;
    }
    let text = |at: usize| tokens.get(at).map_or("", |token| token.text);
    let (mut depth, mut in_rows) = (0_usize, false);
    for index in 0..tokens.len() {
        match text(index) {
            "(" => {
                // A row follows `values` or a comma after the previous row.
                let begins = depth == 0
                    && index > 0
                    && (is_word(index - 1, &["values", "value"])
                        || (in_rows && text(index - 1) == ","));
                in_rows = begins || (in_rows && depth > 0);
                depth += 1;
            }
            ")" => depth = depth.saturating_sub(1),
            "," => {}
            "?" if in_rows
                && depth == 1
                && matches!(text(index - 1), "(" | ",")
                && matches!(text(index + 1), "," | ")") =>
            {
                found.push(index);
            }
            _ if depth == 0 => in_rows = false,
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// The statement with the literal `7` of this class in every place.
    fn rendered(sql: &str, class: Class) -> String {
        let mut text = String::new();
        let template = Template::new(sql.into());
        let written = template.render(0..sql.len(), &mut text, |_, place, text| {
            write_typed(class, place, "7", text);
            Ok::<(), Infallible>(())
        });
        written.expect("nothing fails");
        text
    }

    #[test]
    fn a_literal_in_an_expression_has_an_explicit_type() {
        for (class, expected) in [
            (Class::Null, "select f( 7, 1)"),
            (Class::Signed, "select f( cast(7 as signed), 1)"),
            (Class::Unsigned, "select f( cast(7 as unsigned), 1)"),
            (Class::Double, "select f( (7), 1)"),
            (Class::Text, "select f( concat(7), 1)"),
            (Class::Date, "select f( cast(7 as date), 1)"),
            (Class::Time, "select f( cast(7 as datetime(6)), 1)"),
        ] {
            assert_eq!(rendered("select f(?, 1)", class), expected);
        }
    }

    #[test]
    fn a_literal_alone_in_a_row_or_where_a_number_must_be_is_unchanged() {
        assert_eq!(
            rendered("insert into t values (?, lower(?))", Class::Text),
            "insert into t values (7, lower( concat(7)))"
        );
        assert_eq!(
            rendered("insert into t values (?)", Class::Time),
            "insert into t values ( cast(7 as datetime(6)))"
        );
        assert_eq!(rendered("delete from t limit ?", Class::Signed), "delete from t limit 7");
        assert_eq!(rendered("do 1", Class::Signed), "do 1");
    }

    #[test]
    fn the_place_of_each_parameter_is_recognized() {
        use ParameterPlace::{Expression, Number, Row};
        for (sql, expected) in [
            (
                "insert into t values (?, ?+1, f(?), (?), ?)",
                vec![Row, Expression, Expression, Expression, Row],
            ),
            ("replace t (a, b) value (?, -?), (1, ?)", vec![Row, Expression, Row]),
            (
                "insert into t (a) values (?) on duplicate key update a = ?, b = values(b)",
                vec![Row, Expression],
            ),
            ("insert into t (a) select ? from u", vec![Expression]),
            ("insert into value (value) values (?)", vec![Row]),
            ("insert into t set a = ?", vec![Expression]),
            ("update t set a = ? where b in (?, ?)", vec![Expression; 3]),
            ("insert into t select * from (values row(?)) v", vec![Expression]),
            ("delete from t where a = ? limit ?", vec![Expression, Number]),
            ("select a from t limit ?, ?", vec![Number, Number]),
            ("select a from t limit ? offset ?", vec![Number, Number]),
            ("select lag(?, ?) over (), ntile(?) over ()", vec![Expression, Number, Number]),
            ("call p(?, ?)", vec![Expression; 2]),
        ] {
            let found: Vec<ParameterPlace> =
                find_parameters(sql).into_iter().map(|(_, place)| place).collect();
            assert_eq!(found, expected, "{sql}");
        }
    }
}
