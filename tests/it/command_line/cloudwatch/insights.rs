//! An evaluator of the part of the Logs Insights query language that our page uses: `fields`,
//! `filter`, `stats … by`, `sort` and `limit`, with comparisons, `in`, `like`, `and`, `or`, `not`,
//! `ispresent`, `bin`, and the functions of `stats`. Anything else is an error, and so is a field
//! that no line has.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// A line of a result, or a log line with the fields that CloudWatch adds. Nested fields have names
/// with dots.
pub type Row = BTreeMap<String, Value>;

/// Runs a query.
pub fn run(query: &str, lines: &[Row]) -> Result<Vec<Row>, String> {
    let mut parser = Parser { tokens: tokens(query)?, next: 0 };
    let mut known: BTreeSet<String> = lines.iter().flat_map(|line| line.keys().cloned()).collect();
    let mut rows = lines.to_vec();
    loop {
        let command = parser.name()?;
        match command.as_str() {
            "fields" => {
                let shown = parser.list(&known)?;
                known.extend(shown.iter().map(|(_, name)| name.clone()));
                for row in &mut rows {
                    for (expression, name) in &shown {
                        if let Some(value) = expression.of(row) {
                            row.insert(name.clone(), value);
                        }
                    }
                }
            }
            "filter" => {
                let condition = parser.condition(&known)?;
                rows.retain(|row| condition.holds(row));
            }
            "stats" => {
                let functions = parser.list(&known)?;
                let by = if parser.take("by") { parser.list(&known)? } else { Vec::new() };
                known = functions.iter().chain(&by).map(|(_, name)| name.clone()).collect();
                rows = group(&rows, &functions, &by);
            }
            "sort" => {
                let (by, _) = parser.named(&known)?;
                let descending = parser.take("desc") || !parser.take("asc");
                rows.sort_by(|one, other| {
                    let order = compare(&by.of(one), &by.of(other));
                    if descending { order.reverse() } else { order }
                });
            }
            "limit" => {
                let Some(Token::Number(most)) = parser.token() else {
                    return Err("limit needs a number".into());
                };
                rows.truncate(most as usize);
            }
            _ => return Err(format!("unknown command: {command}")),
        }
        match parser.token() {
            None => return Ok(rows),
            Some(Token::Sign("|")) => {}
            Some(other) => return Err(format!("unexpected {other:?} after {command}")),
        }
    }
}

fn group(
    rows: &[Row],
    functions: &[(Expression, String)],
    by: &[(Expression, String)],
) -> Vec<Row> {
    let mut groups: BTreeMap<String, (Row, Vec<&Row>)> = BTreeMap::new();
    for row in rows {
        let key: Row =
            by.iter().filter_map(|(value, name)| Some((name.clone(), value.of(row)?))).collect();
        groups.entry(format!("{key:?}")).or_insert_with(|| (key, Vec::new())).1.push(row);
    }
    let results = groups.into_values().map(|(mut result, members)| {
        for (function, name) in functions {
            if let Some(value) = function.over(&members) {
                result.insert(name.clone(), value);
            }
        }
        result
    });
    results.collect()
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Name(String),
    Text(String),
    Number(f64),
    Sign(&'static str),
}

const SIGNS: [&str; 13] = ["!=", "<=", ">=", "=", "<", ">", "(", ")", "[", "]", ",", "|", "*"];

fn tokens(query: &str) -> Result<Vec<Token>, String> {
    let mut tokens = Vec::new();
    let mut rest = query.trim_start();
    while let Some(first) = rest.chars().next() {
        let is_of_a_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '@');
        if let Some(text) = rest.strip_prefix('"') {
            let (text, after) = text.split_once('"').ok_or("a string without its closing quote")?;
            tokens.push(Token::Text(text.into()));
            rest = after;
        } else if is_of_a_name(first) {
            let (word, after) =
                rest.split_at(rest.find(|c| !is_of_a_name(c)).unwrap_or(rest.len()));
            tokens.push(word.parse().map_or_else(|_| Token::Name(word.into()), Token::Number));
            rest = after;
        } else {
            let sign = SIGNS
                .iter()
                .find(|sign| rest.starts_with(**sign))
                .ok_or(format!("unexpected {rest:?}"))?;
            tokens.push(Token::Sign(sign));
            rest = &rest[sign.len()..];
        }
        rest = rest.trim_start();
    }
    Ok(tokens)
}

#[derive(Debug, Clone)]
enum Expression {
    Field(String),
    Value(Value),
    Call(String, Vec<Expression>),
    Compare(&'static str, Box<Expression>, Box<Expression>),
    In(Box<Expression>, Vec<Expression>),
    Like(Box<Expression>, String),
    Not(Box<Expression>),
    And(Box<Expression>, Box<Expression>),
    Or(Box<Expression>, Box<Expression>),
}

impl Expression {
    fn of(&self, row: &Row) -> Option<Value> {
        match self {
            Expression::Field(name) => row.get(name).cloned(),
            Expression::Value(value) => Some(value.clone()),
            Expression::Call(name, arguments) if name == "bin" => {
                let Some(Expression::Value(Value::String(period))) = arguments.first() else {
                    return None;
                };
                let minutes: i64 = period.strip_suffix('m')?.parse().ok()?;
                let at = OffsetDateTime::parse(row.get("@timestamp")?.as_str()?, &Rfc3339).ok()?;
                Some((at.unix_timestamp() / (minutes * 60) * minutes * 60).into())
            }
            _ => Some(self.holds(row).into()),
        }
    }

    fn holds(&self, row: &Row) -> bool {
        match self {
            Expression::Call(name, arguments) if name == "ispresent" => {
                arguments.iter().all(|of| of.of(row).is_some())
            }
            Expression::Compare(sign, one, other) => {
                let (Some(one), Some(other)) = (one.of(row), other.of(row)) else { return false };
                let order = compare(&Some(one), &Some(other));
                match *sign {
                    "=" => order.is_eq(),
                    "!=" => order.is_ne(),
                    "<" => order.is_lt(),
                    "<=" => order.is_le(),
                    ">" => order.is_gt(),
                    _ => order.is_ge(),
                }
            }
            Expression::In(one, all) => one
                .of(row)
                .is_some_and(|one| all.iter().any(|other| other.of(row).as_ref() == Some(&one))),
            Expression::Like(one, part) => {
                one.of(row).is_some_and(|one| plain(&one).contains(part.as_str()))
            }
            Expression::Not(one) => !one.holds(row),
            Expression::And(one, other) => one.holds(row) && other.holds(row),
            Expression::Or(one, other) => one.holds(row) || other.holds(row),
            Expression::Field(_) | Expression::Value(_) | Expression::Call(..) => {
                self.of(row) == Some(true.into())
            }
        }
    }

    /// The value of a `stats` function over these rows.
    fn over(&self, rows: &[&Row]) -> Option<Value> {
        let Expression::Call(name, arguments) = self else { return None };
        let Some(argument) = arguments.first() else { return Some(rows.len().into()) };
        let mut given: Vec<(&&Row, Value)> =
            rows.iter().filter_map(|row| Some((row, argument.of(row)?))).collect();
        let numbers = given.iter().filter_map(|(_, value)| value.as_f64());
        match name.as_str() {
            "count" => Some(given.len().into()),
            "sum" => Some(numbers.sum::<f64>().into()),
            "max" => numbers.reduce(f64::max).map(Value::from),
            "min" => numbers.reduce(f64::min).map(Value::from),
            "latest" | "earliest" => {
                given.sort_by_key(|(row, _)| row.get("@timestamp").map(plain));
                if name == "latest" { given.pop() } else { given.into_iter().next() }
                    .map(|(_, value)| value)
            }
            _ => None,
        }
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn compare(one: &Option<Value>, other: &Option<Value>) -> std::cmp::Ordering {
    match (one.as_ref().and_then(Value::as_f64), other.as_ref().and_then(Value::as_f64)) {
        (Some(one), Some(other)) => one.total_cmp(&other),
        _ => one.as_ref().map(plain).cmp(&other.as_ref().map(plain)),
    }
}

struct Parser {
    tokens: Vec<Token>,
    next: usize,
}

impl Parser {
    fn token(&mut self) -> Option<Token> {
        self.next += 1;
        self.tokens.get(self.next - 1).cloned()
    }

    fn name(&mut self) -> Result<String, String> {
        match self.token() {
            Some(Token::Name(name)) => Ok(name),
            other => Err(format!("expected a name, found {other:?}")),
        }
    }

    /// Consumes a word or a sign if it is the next token.
    fn take(&mut self, what: &str) -> bool {
        let is_it = match self.tokens.get(self.next) {
            Some(Token::Name(name)) => name == what,
            Some(Token::Sign(sign)) => *sign == what,
            _ => false,
        };
        self.next += usize::from(is_it);
        is_it
    }

    fn expect(&mut self, what: &str) -> Result<(), String> {
        if self.take(what) {
            Ok(())
        } else {
            Err(format!("expected {what}, found {:?}", self.tokens.get(self.next)))
        }
    }

    /// `VALUE [as NAME], …`.
    fn list(&mut self, known: &BTreeSet<String>) -> Result<Vec<(Expression, String)>, String> {
        let mut list = vec![self.named(known)?];
        while self.take(",") {
            list.push(self.named(known)?);
        }
        Ok(list)
    }

    fn named(&mut self, known: &BTreeSet<String>) -> Result<(Expression, String), String> {
        let value = self.value(known)?;
        let name = match (&value, self.take("as")) {
            (_, true) => self.name()?,
            (Expression::Field(name), false) => name.clone(),
            (other, false) => return Err(format!("{other:?} needs a name")),
        };
        Ok((value, name))
    }

    fn condition(&mut self, known: &BTreeSet<String>) -> Result<Expression, String> {
        let mut either = self.both(known)?;
        while self.take("or") {
            either = Expression::Or(Box::new(either), Box::new(self.both(known)?));
        }
        Ok(either)
    }

    fn both(&mut self, known: &BTreeSet<String>) -> Result<Expression, String> {
        let mut both = self.single(known)?;
        while self.take("and") {
            both = Expression::And(Box::new(both), Box::new(self.single(known)?));
        }
        Ok(both)
    }

    fn single(&mut self, known: &BTreeSet<String>) -> Result<Expression, String> {
        if self.take("not") {
            return Ok(Expression::Not(Box::new(self.single(known)?)));
        }
        if self.take("(") {
            let inner = self.condition(known)?;
            return self.expect(")").map(|()| inner);
        }
        let one = self.value(known)?;
        for sign in ["!=", "<=", ">=", "=", "<", ">"] {
            if self.take(sign) {
                return Ok(Expression::Compare(sign, Box::new(one), Box::new(self.value(known)?)));
            }
        }
        if self.take("in") {
            self.expect("[")?;
            let mut all = vec![self.value(known)?];
            while self.take(",") {
                all.push(self.value(known)?);
            }
            return self.expect("]").map(|()| Expression::In(Box::new(one), all));
        }
        if self.take("like") {
            let Some(Token::Text(part)) = self.token() else {
                return Err("like needs a string".into());
            };
            return Ok(Expression::Like(Box::new(one), part));
        }
        match one {
            Expression::Call(..) => Ok(one),
            other => Err(format!("{other:?} is not a condition")),
        }
    }

    fn value(&mut self, known: &BTreeSet<String>) -> Result<Expression, String> {
        match self.token() {
            Some(Token::Text(text)) => Ok(Expression::Value(text.into())),
            Some(Token::Number(number)) => Ok(Expression::Value(number.into())),
            Some(Token::Name(name)) if self.take("(") => {
                if !["ispresent", "bin", "count", "sum", "max", "min", "latest", "earliest"]
                    .contains(&name.as_str())
                {
                    return Err(format!("unknown function: {name}"));
                }
                let argument = match name.as_str() {
                    "bin" => vec![Expression::Value(self.name()?.into())],
                    "count" if self.take("*") => Vec::new(),
                    _ => vec![self.value(known)?],
                };
                self.expect(")").map(|()| Expression::Call(name, argument))
            }
            Some(Token::Name(name)) if known.contains(&name) => Ok(Expression::Field(name)),
            Some(Token::Name(name)) => Err(format!("no line has a field {name}")),
            other => Err(format!("expected a value, found {other:?}")),
        }
    }
}
