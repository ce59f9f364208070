//! Chooses the text in which a statement is sent. The effect of a statement depends only on its
//! arguments, never on earlier executions.
//!
//! MySQL (since 8.0.22) derives the type of a parameter from its place in the statement and from
//! the value of its first execution, and converts later values to that type. In `ifnull(?, 0)`, the
//! first value decides whether `00123` is stored as `00123` or as `123`. MariaDB does not convert.
//! This module therefore follows three rules:
//!
//! - A parameter in an expression is wrapped in a function that gives it one type: `concat(?)`,
//!   `cast(? as signed)`. The wrapped parameter behaves like a plain literal. `concat(?)` is as
//!   easily coerced to a column's collation as `'text'` is. `convert(? using utf8mb4)` is not, and
//!   fails with error 1267 beside a column of another collation.
//! - A parameter that is alone as a value of an inserted row takes its type from the column. It
//!   needs no function, and a null needs no statement of its own.
//! - Each combination of types has its own text, and so its own prepared statement. A connection
//!   keeps a hundred of them, and closing one costs a delay of 40 ms (Nagle's algorithm and a
//!   delayed acknowledgement). The combinations of one statement are therefore bounded. Further
//!   combinations are sent as text, with literals for the parameters.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::lexer::{Token, TokenKind};
use super::statement::tokenize;

/// The maximum number of prepared texts of one statement.
const MAX_TEXTS: usize = 16;

/// The maximum number of texts with which a statement is still prepared for many rows: each text
/// then has about ten sizes.
const MAX_ROW_TEXTS: usize = 4;

/// The types that MySQL distinguishes. Values of one class do not affect how MySQL reads each
/// other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Class {
    Null,
    Signed,
    Unsigned,
    Double,
    Text,
    Time,
}

impl Class {
    fn letter(self) -> char {
        match self {
            Class::Null => '0',
            Class::Signed => 'i',
            Class::Unsigned => 'u',
            Class::Double => 'f',
            Class::Text => 't',
            Class::Time => 'd',
        }
    }

    /// The texts around a value of this class in an expression.
    pub(super) fn wrapping(self) -> (&'static str, &'static str) {
        match self {
            Class::Null => ("", ""),
            Class::Signed => (" cast(", " as signed)"),
            Class::Unsigned => (" cast(", " as unsigned)"),
            // The product is exact for every double, and keeps the sign of a zero.
            Class::Double => ("(", " * 1e0)"),
            Class::Text => (" concat(", ")"),
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
    /// Where the grammar allows a number or a parameter, but no expression: `limit ?`.
    Number,
}

/// A statement and its texts for each combination of types.
#[derive(Debug)]
pub(super) struct PreparedStatement {
    sql: Box<str>,
    /// The offset of each `?` in the text, in bytes, and its kind of place.
    places: Box<[(usize, ParameterPlace)]>,
    cache: Mutex<TypeCache>,
}

#[derive(Debug)]
struct TypeCache {
    /// The class of each parameter's latest value that was not null.
    latest: Vec<Class>,
    /// The classes of the current execution. The vector is kept to save an allocation.
    current: Vec<Class>,
    texts: HashMap<Vec<Class>, Arc<TypedSql>>,
}

/// The text for one combination of types.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TypedSql {
    pub(super) sql: Arc<str>,
    /// How many bytes longer the statement is, without the comment at its end.
    growth: usize,
}

impl TypedSql {
    /// The text before the row, the row, and the text after it. The row contains all parameters.
    pub(super) fn split_at_row(&self, row: &Range<usize>) -> (&str, &str, &str) {
        let end = row.end + self.growth;
        (&self.sql[..row.start], &self.sql[row.start..end], &self.sql[end..])
    }
}

/// How to send an execution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ExecutionMode {
    /// As a prepared statement.
    Prepared(Arc<TypedSql>),
    /// As text, with literals for the parameters.
    Literal,
}

impl PreparedStatement {
    /// A statement that has `?` for its parameters. No text is built yet.
    pub(super) fn new(sql: String) -> Self {
        let places = find_parameters(&sql);
        let latest = vec![Class::Text; places.len()];
        let cache =
            TypeCache { latest, current: Vec::with_capacity(places.len()), texts: HashMap::new() };
        PreparedStatement { sql: sql.into(), places: places.into(), cache: Mutex::new(cache) }
    }

    pub(super) fn sql(&self) -> &str {
        &self.sql
    }

    /// The kinds of place of the parameters, in order.
    pub(super) fn places(&self) -> impl Iterator<Item = ParameterPlace> {
        self.places.iter().map(|(_, place)| *place)
    }

    /// How to send arguments of these classes: alone, or as one of many rows.
    pub(super) fn execution_mode(
        &self,
        classes: impl Iterator<Item = Class>,
        many: bool,
    ) -> ExecutionMode {
        // The cache stays valid if a holder of the lock panics.
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let TypeCache { latest, current, texts } = &mut *cache;
        current.clear();
        for ((latest, (_, place)), class) in latest.iter_mut().zip(&self.places).zip(classes) {
            current.push(match (place, class) {
                // A null takes the column's type in any text.
                (ParameterPlace::Row, Class::Null) => *latest,
                (ParameterPlace::Row, Class::Unsigned) => Class::Signed,
                _ => class,
            });
            *latest = current[current.len() - 1];
        }
        if let Some(text) = texts.get(current) {
            return if many && texts.len() > MAX_ROW_TEXTS {
                ExecutionMode::Literal
            } else {
                ExecutionMode::Prepared(Arc::clone(text))
            };
        }
        if texts.len() >= MAX_TEXTS {
            if !self.places.iter().any(|(_, place)| *place == ParameterPlace::Number) {
                return ExecutionMode::Literal;
            }
            texts.clear();
        }
        let text = Arc::new(build_typed_sql(&self.sql, &self.places, current));
        texts.insert(current.clone(), Arc::clone(&text));
        ExecutionMode::Prepared(text)
    }

    /// A part of the statement, with the output of `write` in place of each parameter. The part
    /// contains all parameters.
    pub(super) fn with_literals(
        &self,
        part: Range<usize>,
        mut write: impl FnMut(usize, ParameterPlace, &mut String),
    ) -> String {
        let mut text = String::with_capacity(part.len() * 2);
        let mut copied = part.start;
        for (index, (at, place)) in self.places.iter().enumerate() {
            text.push_str(&self.sql[copied..*at]);
            write(index, *place, &mut text);
            copied = at + 1;
        }
        text.push_str(&self.sql[copied..part.end]);
        text
    }
}

/// Writes a value in place of a parameter, wrapped as its class and place require.
pub(super) fn write_typed(class: Class, place: ParameterPlace, value: &str, text: &mut String) {
    // MySQL drops the fraction of a time in a text column, unless the time has an explicit type.
    let is_typed =
        place == ParameterPlace::Expression || (place, class) == (ParameterPlace::Row, Class::Time);
    let (before, after) = if is_typed { class.wrapping() } else { ("", "") };
    text.push_str(before);
    text.push_str(value);
    text.push_str(after);
}

/// Builds the text for one combination of types. It ends in a comment with the types, which keeps
/// the texts distinct. A line comment at the end of the statement may swallow that comment without
/// harm.
fn build_typed_sql(sql: &str, places: &[(usize, ParameterPlace)], classes: &[Class]) -> TypedSql {
    if classes.is_empty() {
        return TypedSql { sql: sql.into(), growth: 0 };
    }
    let mut text = String::with_capacity(sql.len() + 24 * classes.len());
    let mut copied = 0;
    for ((at, place), class) in places.iter().zip(classes) {
        text.push_str(&sql[copied..*at]);
        let is_written = *class == Class::Null && *place == ParameterPlace::Expression;
        write_typed(*class, *place, if is_written { "null" } else { "?" }, &mut text);
        copied = at + 1;
    }
    text.push_str(&sql[copied..]);
    let growth = text.len() - sql.len();
    let letters: String = classes.iter().map(|class| class.letter()).collect();
    TypedSql { sql: format!("{text} /* {letters} */").into(), growth }
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
    use super::Class::{Double, Null, Signed, Text, Time, Unsigned};
    use super::*;

    fn bound(prepared: &PreparedStatement, classes: &[Class]) -> String {
        match prepared.execution_mode(classes.iter().copied(), false) {
            ExecutionMode::Prepared(text) => text.sql.to_string(),
            ExecutionMode::Literal => "literal".into(),
        }
    }

    #[test]
    fn each_combination_of_types_has_a_statement_of_its_own() {
        let prepared = PreparedStatement::new("values (?, ?)".into());
        assert_eq!(
            bound(&prepared, &[Signed, Time]),
            "values ( cast(? as signed),  cast(? as datetime(6))) /* id */"
        );
        assert_eq!(bound(&prepared, &[Double, Text]), "values ((? * 1e0),  concat(?)) /* ft */");
        assert_eq!(
            bound(&prepared, &[Null, Unsigned]),
            "values (null,  cast(? as unsigned)) /* 0u */"
        );
        let first = prepared.execution_mode([Signed, Time].into_iter(), false);
        let (ExecutionMode::Prepared(first), ExecutionMode::Prepared(again)) =
            (first, prepared.execution_mode([Signed, Time].into_iter(), false))
        else {
            panic!("both are prepared")
        };
        assert!(Arc::ptr_eq(&first, &again), "the text is not built again");
    }

    #[test]
    fn a_lone_value_binds_unchanged_and_a_lone_null_reuses_the_latest_form() {
        let prepared = PreparedStatement::new("insert into t values (?)".into());
        assert_eq!(bound(&prepared, &[Null]), "insert into t values (?) /* t */");
        assert_eq!(bound(&prepared, &[Double]), "insert into t values (?) /* f */");
        assert_eq!(bound(&prepared, &[Null]), "insert into t values (?) /* f */");
        assert_eq!(bound(&prepared, &[Signed]), "insert into t values (?) /* i */");
        assert_eq!(bound(&prepared, &[Unsigned]), "insert into t values (?) /* i */");
        assert_eq!(
            bound(&prepared, &[Time]),
            "insert into t values ( cast(? as datetime(6))) /* d */"
        );
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

    #[test]
    fn a_statement_without_parameters_has_a_single_text() {
        assert_eq!(bound(&PreparedStatement::new("do 1".into()), &[]), "do 1");
    }

    #[test]
    fn the_row_is_located_after_casts_are_added() {
        let sql = "insert into t values (?, lower(?)) on duplicate key update a = 1";
        let prepared = PreparedStatement::new(sql.into());
        let ExecutionMode::Prepared(text) = prepared.execution_mode([Text, Text].into_iter(), true)
        else {
            panic!("it is prepared")
        };
        let row = sql.find("(?").expect("a row")..sql.find(" on").expect("an end");
        let expected = (
            "insert into t values ",
            "(?, lower( concat(?)))",
            " on duplicate key update a = 1 /* tt */",
        );
        assert_eq!(text.split_at_row(&row), expected);
    }

    #[test]
    fn many_combinations_of_types_are_sent_as_literals() {
        let prepared = PreparedStatement::new("select f(?, ?, ?, ?, ?, ?, ?, ?)".into());
        let classes =
            |shape: usize| (0..8).map(move |bit| if shape >> bit & 1 == 0 { Signed } else { Text });
        let literals = |many| {
            (0..256)
                .filter(|shape| {
                    prepared.execution_mode(classes(*shape), many) == ExecutionMode::Literal
                })
                .count()
        };
        assert_eq!(literals(false), 256 - MAX_TEXTS);
        assert_eq!(literals(true), 256, "the cache already has too many texts for rows");
        assert_eq!(prepared.cache.lock().expect("no panic").texts.len(), MAX_TEXTS);
        let limited =
            PreparedStatement::new("select a from t where f(?, ?, ?, ?, ?, ?, ?) limit ?".into());
        assert!(
            (0..256).all(
                |shape| limited.execution_mode(classes(shape), false) != ExecutionMode::Literal
            ),
            "`limit` does not accept a literal of every type"
        );
    }
}
