//! A prepared statement of its own for each combination of argument types.
//!
//! MySQL, since 8.0.22, keeps the types that it found for a statement's parameters, and converts later arguments
//! to them. Seen on 9.7: once a double was bound, the string `00123` arrives as `123`, and a long number loses
//! its digits. What an event does must not depend on the events before it on that connection. A connection knows
//! a prepared statement by its text, so a comment with the types makes it one of its own. MariaDB does not
//! convert, and is not harmed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A connection keeps a hundred prepared statements; a field that takes more shapes than this is prepared again.
const MAX_TEXTS: usize = 64;

/// What MySQL tells apart. Within a class, no argument changes what another one does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Class {
    Exact,
    Double,
    Text,
    Time,
}

impl Class {
    fn letter(self) -> char {
        match self {
            Class::Exact => 'n',
            Class::Double => 'f',
            Class::Text => 't',
            Class::Time => 'd',
        }
    }
}

/// A statement and its texts.
#[derive(Debug)]
pub(super) struct Prepared {
    sql: Box<str>,
    seen: Mutex<Seen>,
}

#[derive(Debug)]
struct Seen {
    /// The class of each parameter when it last was not null.
    latest: Vec<Class>,
    /// Kept so that no event copies its statement.
    texts: HashMap<Vec<Class>, Arc<str>>,
}

impl Prepared {
    pub(super) fn new(sql: String, parameters: usize) -> Self {
        let seen = Seen { latest: vec![Class::Text; parameters], texts: HashMap::new() };
        Prepared { sql: sql.into(), seen: Mutex::new(seen) }
    }

    /// The text for arguments of these classes. Null (`None`) is of any class, and takes the latest, so that a
    /// statement with many optional parameters does not become as many statements as there are combinations.
    pub(super) fn text(&self, classes: impl Iterator<Item = Option<Class>>) -> Arc<str> {
        // What is remembered is true after a panic, too.
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for (latest, class) in seen.latest.iter_mut().zip(classes) {
            *latest = class.unwrap_or(*latest);
        }
        let Seen { latest, texts } = &mut *seen;
        if let Some(text) = texts.get(latest) {
            return Arc::clone(text);
        }
        if texts.len() >= MAX_TEXTS {
            texts.clear();
        }
        let text = with_types(&self.sql, latest);
        texts.insert(latest.clone(), Arc::clone(&text));
        text
    }
}

/// At the end, where a line comment of the statement's own may take it in without harm.
fn with_types(sql: &str, classes: &[Class]) -> Arc<str> {
    if classes.is_empty() {
        return sql.into();
    }
    let letters: String = classes.iter().map(|class| class.letter()).collect();
    format!("{sql} /* {letters} */").into()
}

#[cfg(test)]
mod tests {
    use super::Class::{Double, Exact, Text, Time};
    use super::*;

    #[test]
    fn arguments_of_other_types_get_a_statement_of_their_own() {
        let prepared = Prepared::new("values (?, ?)".into(), 2);
        let text = |classes: [Option<Class>; 2]| prepared.text(classes.into_iter());
        let first = text([Some(Exact), Some(Time)]);
        assert_eq!(&*first, "values (?, ?) /* nd */");
        assert_eq!(&*text([Some(Double), Some(Time)]), "values (?, ?) /* fd */");
        assert_eq!(&*text([Some(Text), Some(Time)]), "values (?, ?) /* td */");
        assert!(Arc::ptr_eq(&first, &text([Some(Exact), Some(Time)])), "it is not made again");
    }

    #[test]
    fn null_goes_with_the_statement_of_the_latest_value() {
        let prepared = Prepared::new("values (?)".into(), 1);
        let text = |class| prepared.text([class].into_iter()).to_string();
        assert_eq!(text(None), "values (?) /* t */");
        assert_eq!(text(Some(Double)), "values (?) /* f */");
        assert_eq!(text(None), "values (?) /* f */");
    }

    #[test]
    fn a_statement_without_parameters_has_one_text() {
        assert_eq!(&*Prepared::new("do 1".into(), 0).text([].into_iter()), "do 1");
    }

    #[test]
    fn memory_does_not_grow_with_the_shapes_of_events() {
        let prepared = Prepared::new("values (?)".into(), 8);
        for shape in 0..256 {
            prepared.text((0..8).map(|bit| Some(if shape >> bit & 1 == 0 { Exact } else { Text })));
        }
        assert!(prepared.seen.lock().expect("no panic").texts.len() <= MAX_TEXTS);
    }
}
