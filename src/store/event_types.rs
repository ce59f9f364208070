//! Which event types occur in the log, found without a scan of a long log.

use std::collections::HashSet;

use super::EventStore;

/// How many events are read at each end of the log. There is no index by type, because it would
/// slow down every append.
const SAMPLE: u64 = 50_000;

const TYPES: &str = "\
    select event_type from \
        (select event_type from events order by position limit 50000) as first_events \
    union \
    select event_type from \
        (select event_type from events order by position desc limit 50000) as last_events";

const RANGE: &str = "\
    select cast(coalesce(max(position) - min(position) + 1, 0) as unsigned) from events";

/// The event types at both ends of the log.
#[derive(Debug)]
pub(crate) struct TypeSample {
    types: HashSet<String>,
    /// Whether every event of the log was read.
    is_whole: bool,
}

impl EventStore {
    /// Reads the event types at both ends of the log.
    pub(crate) async fn sample_types(&self) -> Result<TypeSample, sqlx::Error> {
        self.database
            .run_pooled(async |connection| {
                let events: u64 = sqlx::query_scalar(RANGE).fetch_one(&mut *connection).await?;
                let types: Vec<String> = sqlx::query_scalar(TYPES).fetch_all(connection).await?;
                Ok(TypeSample { types: types.into_iter().collect(), is_whole: events <= SAMPLE })
            })
            .await
    }
}

impl TypeSample {
    /// Describes the wanted types that do not occur. `None` if each occurs, or if the log is empty.
    pub(crate) fn describe_missing<'t>(
        &self,
        wanted: impl Iterator<Item = &'t String>,
    ) -> Option<String> {
        let mut missing: Vec<&String> =
            wanted.filter(|wanted| !self.types.contains(*wanted)).collect();
        if self.types.is_empty() || missing.is_empty() {
            return None;
        }
        missing.sort();
        let more = missing.len().saturating_sub(MAX_NAMED);
        let described: Vec<String> = missing
            .iter()
            .take(MAX_NAMED)
            .map(|wanted| match self.similar(wanted) {
                Some(similar) => format!("{wanted:?} (did you mean {similar:?}?)"),
                None => format!("{wanted:?}"),
            })
            .collect();
        let others = if more > 0 { format!(", and {more} others") } else { String::new() };
        let place = if self.is_whole {
            "in the log".to_owned()
        } else {
            format!("among the first and the last {SAMPLE} events of the log")
        };
        Some(format!("no event {place} has the type {}{others}", described.join(", ")))
    }

    /// A type that differs only in case, backslashes or other symbols.
    fn similar(&self, wanted: &str) -> Option<&String> {
        let wanted = letters(wanted);
        self.types.iter().filter(|known| letters(known) == wanted).min()
    }
}

/// How many missing types are named.
const MAX_NAMED: usize = 5;

fn letters(name: &str) -> String {
    name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_that_differs_only_in_case_or_backslashes_is_suggested() {
        let sample = |is_whole| TypeSample {
            types: ["OrderPlaced", "App\\Billing\\Paid"].map(str::to_owned).into(),
            is_whole,
        };
        let describe = |is_whole, wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
            sample(is_whole).describe_missing(wanted.iter())
        };
        assert_eq!(describe(true, &["OrderPlaced"]), None);
        assert_eq!(
            describe(true, &["orderplaced", "AppBillingPaid", "Other"]).as_deref(),
            Some(
                "no event in the log has the type \"AppBillingPaid\" (did you mean \
                 \"App\\\\Billing\\\\Paid\"?), \"Other\", \"orderplaced\" (did you mean \
                 \"OrderPlaced\"?)"
            )
        );
        let long =
            describe(false, &["1", "2", "3", "4", "5", "6", "7"]).expect("seven are missing");
        assert!(long.contains("the last 50000 events") && long.ends_with("and 2 others"), "{long}");
        let empty = TypeSample { types: HashSet::new(), is_whole: true };
        assert_eq!(empty.describe_missing(["A".to_owned()].iter()), None);
    }
}
