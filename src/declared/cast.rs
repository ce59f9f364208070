//! Casts of parameters: `:payload.at|datetime` binds an ISO 8601 date as a `datetime` in UTC.

use time::{Date, Duration, Month, OffsetDateTime, PrimitiveDateTime, Time, UtcOffset};

use super::json::Value;

/// A cast that a parameter names after a `|`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cast {
    /// An ISO 8601 date with or without a time and an offset, as a date and time in UTC.
    DateTime,
    /// The date of [`Cast::DateTime`].
    Date,
    /// Seconds since 1970 in UTC, as a date and time in UTC.
    UnixSeconds,
    /// Milliseconds since 1970 in UTC, as a date and time in UTC.
    UnixMilliseconds,
}

/// A value after its cast.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum CastValue {
    Null,
    Date(Date),
    Time(PrimitiveDateTime),
}

impl Cast {
    /// Every cast, with its name in a file.
    pub(super) const ALL: [(&'static str, Cast); 4] = [
        ("datetime", Cast::DateTime),
        ("date", Cast::Date),
        ("unix_seconds", Cast::UnixSeconds),
        ("unix_milliseconds", Cast::UnixMilliseconds),
    ];

    /// Casts a value. Null stays null.
    ///
    /// # Errors
    /// What a valid value looks like, if this one is not valid.
    pub(super) fn apply(self, value: &Value<'_>) -> Result<CastValue, &'static str> {
        let time = match (self, value) {
            (_, Value::Null) => return Ok(CastValue::Null),
            (Cast::DateTime | Cast::Date, Value::Text(text)) => parse_date_time(text),
            (Cast::UnixSeconds, value) => since_1970(value, 1_000_000_000),
            (Cast::UnixMilliseconds, value) => since_1970(value, 1_000_000),
            _ => None,
        };
        let valid = match self {
            Cast::DateTime | Cast::Date => {
                "a date like \"2024-05-01T10:00:00Z\", \"2024-05-01T12:00:00.5+02:00\" (with an \
                 offset), \"2024-05-01 10:00:00\" or \"2024-05-01\" (in UTC)"
            }
            Cast::UnixSeconds => "a number of seconds since 1970, like 1714557600 or 1714557600.5",
            Cast::UnixMilliseconds => "a number of milliseconds since 1970, like 1714557600000",
        };
        let time = time.filter(|time| (0..=9999).contains(&time.year())).ok_or(valid)?;
        Ok(match self {
            Cast::Date => CastValue::Date(time.date()),
            _ => CastValue::Time(time),
        })
    }
}

/// Parses `2024-05-01`, or that with `T10:00`, `T10:00:00` or `T10:00:00.123456789`, and then
/// perhaps `Z`, `+02:00`, `+0200` or `+02`. A blank may replace the `T`. Without an offset, the
/// time is in UTC. Digits beyond microseconds are cut off.
fn parse_date_time(text: &str) -> Option<PrimitiveDateTime> {
    let mut rest = Digits(text.as_bytes());
    let year = rest.number(4)?;
    let month = rest.symbol(b"-").and_then(|()| rest.number(2))?;
    let day = rest.symbol(b"-").and_then(|()| rest.number(2))?;
    let month = Month::try_from(u8::try_from(month).ok()?).ok()?;
    let date = Date::from_calendar_date(i32::try_from(year).ok()?, month, day as u8).ok()?;
    if rest.0.is_empty() {
        return Some(PrimitiveDateTime::new(date, Time::MIDNIGHT));
    }
    rest.symbol(b"Tt ")?;
    let hour = rest.number(2)?;
    let minute = rest.symbol(b":").and_then(|()| rest.number(2))?;
    let (mut second, mut micro) = (0, 0);
    if rest.symbol(b":").is_some() {
        second = rest.number(2)?;
        if rest.symbol(b".,").is_some() {
            micro = rest.microseconds()?;
        }
    }
    let time = Time::from_hms_micro(hour as u8, minute as u8, second as u8, micro).ok()?;
    let offset = rest.offset()?;
    let time = PrimitiveDateTime::new(date, time).assume_utc();
    let utc = time.checked_sub(Duration::seconds(i64::from(offset.whole_seconds())))?;
    rest.0.is_empty().then(|| PrimitiveDateTime::new(utc.date(), utc.time()))
}

/// The rest of a text that is being parsed.
struct Digits<'t>(&'t [u8]);

impl Digits<'_> {
    /// Takes exactly `digits` digits.
    fn number(&mut self, digits: usize) -> Option<u32> {
        let (number, rest) = self.0.split_at_checked(digits)?;
        if !number.iter().all(u8::is_ascii_digit) {
            return None;
        }
        self.0 = rest;
        str::from_utf8(number).ok()?.parse().ok()
    }

    /// Takes one of these characters.
    fn symbol(&mut self, any_of: &[u8]) -> Option<()> {
        let (first, rest) = self.0.split_first()?;
        any_of.contains(first).then(|| self.0 = rest)
    }

    /// Takes the digits of a fraction of a second.
    fn microseconds(&mut self) -> Option<u32> {
        let count = self.0.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (digits, rest) = self.0.split_at(count);
        self.0 = rest;
        let digit = |at: usize| digits.get(at).map_or(0, |byte| u32::from(byte - b'0'));
        (count > 0).then(|| (0..6).fold(0, |number, at| number * 10 + digit(at)))
    }

    /// Takes an offset from UTC. No offset is UTC.
    fn offset(&mut self) -> Option<UtcOffset> {
        let sign = match self.0.first() {
            Some(b'+') => 1,
            Some(b'-') => -1,
            Some(b'Z' | b'z') => {
                self.symbol(b"Zz")?;
                return Some(UtcOffset::UTC);
            }
            _ => return Some(UtcOffset::UTC),
        };
        self.symbol(b"+-")?;
        let hours = self.number(2)?;
        let has_colon = self.symbol(b":").is_some();
        let minutes = if has_colon || !self.0.is_empty() { self.number(2)? } else { 0 };
        let (hours, minutes) = (i8::try_from(hours).ok()?, i8::try_from(minutes).ok()?);
        UtcOffset::from_hms(sign * hours, sign * minutes, 0).ok()
    }
}

/// The time that is `value` times `unit_nanoseconds` after 1970, to the microsecond.
fn since_1970(value: &Value<'_>, unit_nanoseconds: i128) -> Option<PrimitiveDateTime> {
    let nanoseconds = match value {
        Value::Signed(number) => i128::from(*number) * unit_nanoseconds,
        Value::Unsigned(number) => i128::from(*number) * unit_nanoseconds,
        // A double of seconds has microseconds until the year 2242.
        Value::Double(number) if number.abs() < 1e15 => {
            (number * (unit_nanoseconds / 1_000) as f64).round() as i128 * 1_000
        }
        _ => return None,
    };
    let time = OffsetDateTime::from_unix_timestamp_nanos(nanoseconds).ok()?;
    Some(PrimitiveDateTime::new(time.date(), time.time()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::declared::literal;

    fn cast(cast: Cast, json: &str) -> Result<String, &'static str> {
        let value = Value::parse(json).expect("a JSON value");
        cast.apply(&value).map(|value| match value {
            CastValue::Null => "null".into(),
            CastValue::Date(date) => literal::date(date),
            CastValue::Time(time) => literal::datetime(time),
        })
    }

    #[test]
    fn an_iso_date_is_read_as_a_time_in_utc() {
        for (text, expected) in [
            ("2024-05-01T10:00:00Z", "2024-05-01 10:00:00"),
            ("2024-05-01t10:00:00z", "2024-05-01 10:00:00"),
            ("2024-05-01T10:00:00.000Z", "2024-05-01 10:00:00"),
            ("2024-05-01T10:00:00.123Z", "2024-05-01 10:00:00.123000"),
            ("2024-05-01T10:00:00.123456789Z", "2024-05-01 10:00:00.123456"),
            ("2024-05-01T10:00:00,5Z", "2024-05-01 10:00:00.500000"),
            ("2024-05-01T12:00:00+02:00", "2024-05-01 10:00:00"),
            ("2024-05-01T12:00:00+0200", "2024-05-01 10:00:00"),
            ("2024-05-01T12:00:00+02", "2024-05-01 10:00:00"),
            ("2024-05-01T23:30:00-02:30", "2024-05-02 02:00:00"),
            ("2024-03-01T00:30+01:00", "2024-02-29 23:30:00"),
            ("2024-05-01 10:00", "2024-05-01 10:00:00"),
            ("2024-05-01", "2024-05-01 00:00:00"),
            ("9999-12-31T23:59:59.999999Z", "9999-12-31 23:59:59.999999"),
            ("0001-01-01T00:00:00Z", "0001-01-01 00:00:00"),
        ] {
            let found = cast(Cast::DateTime, &format!("\"{text}\""));
            assert_eq!(found, Ok(format!("timestamp'{expected}'")), "{text}");
            let date = format!("date'{}'", &expected[..10]);
            assert_eq!(cast(Cast::Date, &format!("\"{text}\"")), Ok(date), "{text}");
        }
        assert_eq!(cast(Cast::DateTime, "null"), Ok("null".into()));
    }

    #[test]
    fn a_number_since_1970_is_read_in_its_unit() {
        for (unit, json, expected) in [
            (Cast::UnixSeconds, "1714557600", "2024-05-01 10:00:00"),
            (Cast::UnixSeconds, "1714557600.25", "2024-05-01 10:00:00.250000"),
            (Cast::UnixSeconds, "-1", "1969-12-31 23:59:59"),
            (Cast::UnixMilliseconds, "1714557600123", "2024-05-01 10:00:00.123000"),
            (Cast::UnixMilliseconds, "0", "1970-01-01 00:00:00"),
        ] {
            assert_eq!(cast(unit, json), Ok(format!("timestamp'{expected}'")), "{json}");
        }
    }

    #[test]
    fn a_value_that_is_not_a_date_is_refused_with_an_example() {
        for json in [
            "\"\"",
            "\"today\"",
            "\"2024-02-30\"",
            "\"2024-13-01\"",
            "\"2024-5-1\"",
            "\"24-05-01\"",
            "\"2024-05-01T\"",
            "\"2024-05-01T10\"",
            "\"2024-05-01T24:00:00Z\"",
            "\"2024-05-01T10:00:60Z\"",
            "\"2024-05-01T10:00:00.Z\"",
            "\"2024-05-01T10:00:00+2\"",
            "\"2024-05-01T10:00:00+99:00\"",
            "\"2024-05-01T10:00:00Z \"",
            "\"2024-05-01T10:00:00Zulu\"",
            "\"0000-01-01T00:00:00+01:00\"",
            "\"2024-05-0é\"",
            "1714557600",
            "true",
            "{}",
        ] {
            let refused = cast(Cast::DateTime, json).expect_err(json);
            assert!(refused.contains("2024-05-01T10:00:00Z"), "{json}: {refused}");
        }
        for json in ["\"1714557600\"", "1e300", "99999999999999999", "true"] {
            let refused = cast(Cast::UnixSeconds, json).expect_err(json);
            assert!(refused.contains("seconds since 1970"), "{json}: {refused}");
        }
    }
}
