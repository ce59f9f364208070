//! Many rows in one `insert … values`.
//!
//! Why ours: `sqlx::QueryBuilder` puts all rows into one statement. This splits them by number,
//! bytes and text length, into few different statements that the server prepares once.

use std::ops::Range;

use sqlx::encode::{Encode, IsNull};
use sqlx::error::BoxDynError;
use sqlx::mysql::{MySqlArguments, MySqlTypeInfo};
use sqlx::{Arguments as _, AssertSqlSafe, MySql, MySqlConnection, Type};
use time::{OffsetDateTime, PrimitiveDateTime};

/// The most rows in a statement. Twice as many would hardly be faster.
const MAX_ROWS: usize = 512;

/// The most bytes that a statement binds: half of the smallest `max_allowed_packet` in use, 1 MiB.
pub(crate) const MAX_BYTES: usize = 512 * 1024;

/// The most placeholders in a statement. The limit bounds the server's memory, because each
/// connection may keep a hundred statements. The protocol allows 65,535.
const MAX_PLACEHOLDERS: usize = 8 * 1024;

/// The longest text of a statement, in bytes. The limit bounds this program's memory.
const MAX_TEXT_BYTES: usize = 64 * 1024;

/// The bytes of a value in addition to its data: its type and its null bit.
const VALUE_OVERHEAD: usize = 3;

/// Collects rows and sends them in few statements: `insert … values (…), (…), …`.
///
/// Use it in [`Projector::handle_batch`](crate::Projector::handle_batch), where one statement
/// per event would cost one round trip per event. The number of rows in a statement is a power of
/// two, up to 512, so that the server prepares few different statements. One statement binds at
/// most about 512 KiB, or one row. The value can be reused after [`MultiRowInsert::execute`].
///
/// The rows are inserted in the order in which they were added, so `on duplicate key update` sees
/// the earlier rows. Some results differ from those of one statement per row: what a trigger sees,
/// the value of `last_insert_id()`, the numbers that an `auto_increment` column skips, and `now()`.
/// Bind the same types in each row.
///
/// ```
/// use projectionist::{Event, EventTypes, MultiRowInsert, Projector, async_trait, sqlx};
///
/// struct CasesPerDepartment;
///
/// #[derive(serde::Deserialize)]
/// struct Received { department: String }
///
/// #[async_trait]
/// impl Projector for CasesPerDepartment {
///     fn name(&self) -> &str { "cases_per_department" }
///
///     fn event_types(&self) -> EventTypes { EventTypes::only(["Confirmation of receipt"]) }
///
///     async fn handle_batch(
///         &self,
///         events: &[&Event],
///         db: &mut sqlx::MySqlConnection,
///     ) -> anyhow::Result<()> {
///         let insert = "insert into cases_per_department (department, cases) values";
///         let mut rows = MultiRowInsert::new(insert)
///             .with_tail("on duplicate key update cases = cases + values(cases)");
///         for event in events {
///             let received: Received = event.payload()?;
///             rows.row().bind(received.department).bind(1);
///         }
///         rows.execute(db).await?;
///         Ok(())
///     }
///
///     async fn handle(
///         &self,
///         event: &Event,
///         db: &mut sqlx::MySqlConnection,
///     ) -> anyhow::Result<()> {
///         self.handle_batch(&[event], db).await
///     }
/// }
/// ```
#[derive(Debug)]
pub struct MultiRowInsert {
    head: &'static str,
    tail: &'static str,
    rows: Rows,
    /// The first error from encoding a value; `execute` returns it.
    encode_error: Option<BoxDynError>,
}

impl MultiRowInsert {
    /// Creates a statement from the text before the rows: `insert into t (a, b) values`.
    pub fn new(head: &'static str) -> Self {
        MultiRowInsert { head, tail: "", rows: Rows::default(), encode_error: None }
    }

    /// Sets the text after the rows: `on duplicate key update …`. It cannot bind values.
    #[must_use]
    pub fn with_tail(self, tail: &'static str) -> Self {
        MultiRowInsert { tail, ..self }
    }

    /// Begins a row.
    pub fn row(&mut self) -> &mut Self {
        self.rows.begin_row();
        self
    }

    /// Adds a value to the current row. A time with an offset is bound as a `datetime` in UTC.
    pub fn bind<'v, T: Encode<'v, MySql> + Type<MySql>>(&mut self, value: T) -> &mut Self {
        let bound = self.rows.bind(value);
        if let (Err(error), None) = (bound, &self.encode_error) {
            self.encode_error = Some(error);
        }
        self
    }

    /// How many rows have not been sent yet.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether all rows have been sent.
    pub fn is_empty(&self) -> bool {
        self.rows.len() == 0
    }

    /// Sends all rows and removes them. Returns the number of affected rows of the table, as the
    /// server counts them.
    ///
    /// # Errors
    /// The error of the first statement that fails. The earlier statements have been executed, so
    /// roll back the transaction; returning the error from a handler does that. Before anything is
    /// sent: if rows have different numbers of values, if a value cannot be encoded, or if there is
    /// a `?` outside the rows.
    pub async fn execute(&mut self, db: &mut MySqlConnection) -> sqlx::Result<u64> {
        let rows = std::mem::take(&mut self.rows);
        if let Some(error) = self.encode_error.take() {
            return Err(sqlx::Error::Encode(error));
        }
        let refuse =
            |reason: &str| Err(sqlx::Error::InvalidArgument(format!("{reason}: {}", self.head)));
        let values = rows.row_values(0).len();
        if (1..rows.len()).any(|row| rows.row_values(row).len() != values) {
            return refuse("the rows have different numbers of values");
        }
        if self.head.contains('?') || self.tail.contains('?') {
            return refuse("values can only be bound in the rows, but a ? is outside of them");
        }
        let row = format!("({})", vec!["?"; values].join(", "));
        rows.execute(
            Statement {
                head: &format!("{} ", self.head),
                row: &row,
                tail: &format!(" {}", self.tail),
            },
            db,
        )
        .await
    }
}

/// The parts of a statement's text. `row` is repeated for each row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Statement<'s> {
    pub(crate) head: &'s str,
    pub(crate) row: &'s str,
    pub(crate) tail: &'s str,
}

impl Statement<'_> {
    fn text(self, rows: usize) -> String {
        let mut text =
            String::with_capacity(self.head.len() + rows * (self.row.len() + 1) + self.tail.len());
        text.push_str(self.head);
        for row in 0..rows {
            text.push_str(if row == 0 { "" } else { "," });
            text.push_str(self.row);
        }
        text.push_str(self.tail);
        text
    }
}

/// Rows of encoded values.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    bytes: Vec<u8>,
    values: Vec<Value>,
    /// The index of the first value of each row.
    row_starts: Vec<usize>,
}

#[derive(Debug)]
struct Value {
    /// The offset at which the value's bytes end.
    end: usize,
    is_null: bool,
    type_info: MySqlTypeInfo,
}

impl Rows {
    pub(crate) fn begin_row(&mut self) {
        self.row_starts.push(self.values.len());
    }

    /// Adds a value to the current row.
    ///
    /// # Errors
    /// If the value cannot be encoded.
    pub(crate) fn bind<'v, T: Encode<'v, MySql> + Type<MySql>>(
        &mut self,
        value: T,
    ) -> Result<(), BoxDynError> {
        let mut type_info = value.produces().unwrap_or_else(T::type_info);
        if type_info == <OffsetDateTime as Type<MySql>>::type_info() {
            // A `timestamp` has the same bytes, but MariaDB turns it into null outside of 1970 to
            // 2038.
            type_info = <PrimitiveDateTime as Type<MySql>>::type_info();
        }
        let is_null = value.encode(&mut self.bytes)?.is_null();
        self.values.push(Value { end: self.bytes.len(), is_null, type_info });
        Ok(())
    }

    pub(crate) fn len(&self) -> usize {
        self.row_starts.len()
    }

    /// The indices of a row's values.
    fn row_values(&self, row: usize) -> Range<usize> {
        let begin = |row: usize| self.row_starts.get(row).copied().unwrap_or(self.values.len());
        begin(row)..begin(row + 1)
    }

    fn row_bytes(&self, row: usize) -> usize {
        let values = self.row_values(row);
        self.bytes_of(values.clone()).len() + VALUE_OVERHEAD * values.len()
    }

    fn bytes_of(&self, values: Range<usize>) -> Range<usize> {
        let end_before = |value: usize| if value == 0 { 0 } else { self.values[value - 1].end };
        end_before(values.start)..end_before(values.end)
    }

    /// Sends all rows in order, and returns the number of affected rows.
    pub(crate) async fn execute(
        &self,
        statement: Statement<'_>,
        db: &mut MySqlConnection,
    ) -> sqlx::Result<u64> {
        let sizes: Vec<usize> = (0..self.len()).map(|row| self.row_bytes(row)).collect();
        let max = max_rows(statement.row.len(), self.row_values(0).len());
        let (mut sent, mut affected) = (0, 0);
        while sent < sizes.len() {
            let count = next_chunk(&sizes[sent..], max);
            let arguments = self.arguments(sent..sent + count).map_err(sqlx::Error::Encode)?;
            let query = sqlx::query_with(AssertSqlSafe(statement.text(count)), arguments);
            affected += query.execute(&mut *db).await?.rows_affected();
            sent += count;
        }
        Ok(affected)
    }

    /// The arguments of a statement that sends these rows.
    pub(crate) fn arguments(&self, rows: Range<usize>) -> Result<MySqlArguments, BoxDynError> {
        let values = self.row_values(rows.start).start..self.row_values(rows.end - 1).end;
        let mut arguments = MySqlArguments::default();
        arguments.reserve(values.len(), self.bytes_of(values.clone()).len());
        for value in values {
            let bytes = &self.bytes[self.bytes_of(value..value + 1)];
            arguments.add(EncodedValue { bytes, value: &self.values[value] })?;
        }
        Ok(arguments)
    }
}

/// A value that is already encoded.
struct EncodedValue<'r> {
    bytes: &'r [u8],
    value: &'r Value,
}

impl Type<MySql> for EncodedValue<'_> {
    /// Never called, because each value has its own type ([`produces`](Encode::produces)).
    fn type_info() -> MySqlTypeInfo {
        <str as Type<MySql>>::type_info()
    }
}

impl Encode<'_, MySql> for EncodedValue<'_> {
    fn encode_by_ref(&self, buf: &mut Vec<u8>) -> Result<IsNull, BoxDynError> {
        buf.extend_from_slice(self.bytes);
        Ok(if self.value.is_null { IsNull::Yes } else { IsNull::No })
    }

    fn produces(&self) -> Option<MySqlTypeInfo> {
        Some(self.value.type_info.clone())
    }
}

/// The most rows in a statement with this text length and number of values per row.
fn max_rows(text: usize, values: usize) -> usize {
    MAX_ROWS.min(MAX_TEXT_BYTES / (text + 1)).min(MAX_PLACEHOLDERS / values.max(1))
}

/// How many rows the next statement sends. A power of two, so that few different statements are
/// prepared.
fn next_chunk(sizes: &[usize], max: usize) -> usize {
    let mut count = 1;
    let mut size: usize = sizes.first().copied().unwrap_or(0);
    while count * 2 <= sizes.len().min(max) {
        size += sizes[count..count * 2].iter().sum::<usize>();
        if size > MAX_BYTES {
            break;
        }
        count *= 2;
    }
    count
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn chunks(sizes: &[usize], max: usize) -> Vec<usize> {
        let (mut chunks, mut sent) = (Vec::new(), 0);
        while sent < sizes.len() {
            chunks.push(next_chunk(&sizes[sent..], max));
            sent += chunks[chunks.len() - 1];
        }
        chunks
    }

    #[test]
    fn rows_are_split_into_powers_of_two_largest_first() {
        for (rows, max, expected) in [
            (0, 512, vec![]),
            (1, 512, vec![1]),
            (7, 512, vec![4, 2, 1]),
            (999, 512, vec![512, 256, 128, 64, 32, 4, 2, 1]),
            (1100, 512, vec![512, 512, 64, 8, 4]),
            (10, 3, vec![2, 2, 2, 2, 2]),
            (2, 0, vec![1, 1]),
        ] {
            assert_eq!(chunks(&vec![10; rows], max), expected, "{rows} rows, {max} at most");
        }
    }

    #[test]
    fn large_rows_go_in_smaller_statements_and_an_oversized_row_goes_alone() {
        let half = MAX_BYTES / 2;
        assert_eq!(chunks(&[half, half, half], MAX_ROWS), [2, 1]);
        assert_eq!(chunks(&[1, 1, 10 * MAX_BYTES, 1, 1], MAX_ROWS), [2, 1, 2]);
    }

    #[test]
    fn wide_rows_and_long_texts_make_smaller_statements() {
        assert_eq!(max_rows(10, 3), MAX_ROWS);
        assert_eq!(max_rows(10, 0), MAX_ROWS);
        assert_eq!(max_rows(1023, 3), 64);
        assert_eq!(max_rows(200, 100), 81);
        assert_eq!(max_rows(1_000_000, 60_000), 0);
    }

    #[test]
    fn a_single_row_leaves_the_statement_unchanged() {
        let statement =
            Statement { head: "insert into t values ", row: "(?, 1)", tail: " /* n */" };
        assert_eq!(statement.text(1), "insert into t values (?, 1) /* n */");
        assert_eq!(statement.text(3), "insert into t values (?, 1),(?, 1),(?, 1) /* n */");
    }

    #[test]
    fn values_are_encoded_as_the_driver_encodes_them() {
        let mut rows = Rows::default();
        let mut expected = MySqlArguments::default();
        for number in 0..10_u64 {
            rows.begin_row();
            rows.bind(number).expect("encoded");
            rows.bind(Some("text").filter(|_| number % 3 == 0)).expect("encoded");
            rows.bind("é".repeat(200)).expect("encoded");
            if (2..6).contains(&number) {
                expected.add(number).expect("encoded");
                expected.add(Some("text").filter(|_| number % 3 == 0)).expect("encoded");
                expected.add("é".repeat(200)).expect("encoded");
            }
        }
        assert_eq!(rows.len(), 10);
        let arguments = rows.arguments(2..6).expect("encoded");
        assert_eq!(format!("{arguments:?}"), format!("{expected:?}"));
    }

    proptest! {
        #[test]
        fn every_row_is_sent_once_and_no_statement_is_too_large(
            sizes in proptest::collection::vec(0..MAX_BYTES / 4, 0..300),
            max in 0..600_usize,
        ) {
            let chunks = chunks(&sizes, max);
            prop_assert_eq!(chunks.iter().sum::<usize>(), sizes.len());
            let mut sent = 0;
            for count in chunks {
                prop_assert!(count.is_power_of_two() && count <= max.max(1));
                prop_assert!(sizes[sent..sent + count].iter().sum::<usize>() <= MAX_BYTES);
                sent += count;
            }
        }
    }
}
