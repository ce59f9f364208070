//! Values as SQL literals.
//!
//! The server reads each literal as exactly the value that would have been bound. This holds
//! because this program sets the session's `sql_mode`, which has no `NO_BACKSLASH_ESCAPES`, and its
//! client character set, which is utf8mb4.
//!
//! Why ours: sqlx binds values; it does not write them as SQL text.

use std::fmt::Write as _;

use time::{Date, PrimitiveDateTime};

/// A string literal.
pub(super) fn text(value: &str) -> String {
    let mut literal = String::with_capacity(value.len() + 2);
    literal.push('\'');
    for part in value.split_inclusive(['\'', '\\', '\0']) {
        let (plain, special) = match part.as_bytes().last() {
            Some(b'\'') => (&part[..part.len() - 1], "''"),
            Some(b'\\') => (&part[..part.len() - 1], "\\\\"),
            Some(0) => (&part[..part.len() - 1], "\\0"),
            _ => (part, ""),
        };
        literal.push_str(plain);
        literal.push_str(special);
    }
    literal.push('\'');
    literal
}

/// A double. It has an exponent, because `1.5` would be a decimal.
pub(super) fn double(value: f64) -> String {
    format!("{value:e}")
}

/// A date.
pub(super) fn date(value: Date) -> String {
    format!("date'{:04}-{:02}-{:02}'", value.year(), u8::from(value.month()), value.day())
}

/// A datetime. The fraction of a second is left out if it is zero, as in the binary protocol.
pub(super) fn datetime(value: PrimitiveDateTime) -> String {
    let (date, time) = (value.date(), value.time());
    let mut literal = format!(
        "timestamp'{:04}-{:02}-{:02} {:02}:{:02}:{:02}",
        date.year(),
        u8::from(date.month()),
        date.day(),
        time.hour(),
        time.minute(),
        time.second()
    );
    if time.microsecond() > 0 {
        write!(literal, ".{:06}", time.microsecond()).expect("writing to a string never fails");
    }
    literal.push('\'');
    literal
}

#[cfg(test)]
mod tests {
    use time::{Month, Time};

    use super::*;

    #[test]
    fn any_text_is_quoted_safely() {
        for (value, literal) in [
            ("", "''"),
            ("plain é😀", "'plain é😀'"),
            ("it's", "'it''s'"),
            ("''", "''''''"),
            (r"a\'b\", r"'a\\''b\\'"),
            ("a\0b\nc", "'a\\0b\nc'"),
        ] {
            assert_eq!(text(value), literal, "{value:?}");
        }
    }

    #[test]
    fn a_double_is_not_a_decimal_and_a_datetime_keeps_its_fraction() {
        assert_eq!(
            [1.5, -0.0, 1e300, 5e-324, 3.0].map(double),
            ["1.5e0", "-0e0", "1e300", "5e-324", "3e0"]
        );
        let date = Date::from_calendar_date(1969, Month::December, 31).expect("a date");
        let at = |microsecond| {
            datetime(PrimitiveDateTime::new(
                date,
                Time::from_hms_micro(23, 59, 9, microsecond).expect("a time"),
            ))
        };
        assert_eq!(
            (at(0).as_str(), at(50).as_str()),
            ("timestamp'1969-12-31 23:59:09'", "timestamp'1969-12-31 23:59:09.000050'")
        );
    }
}
