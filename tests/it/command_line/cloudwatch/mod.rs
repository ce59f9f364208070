//! Compares `infra/cloudwatch.md` with the lines that the shipped binary writes: its fields,
//! metrics and queries.

mod insights;
mod metrics;
mod page;
mod scenario;
mod source;

use std::collections::BTreeSet;

use serde_json::Value;

use insights::Row;
use page::Page;
use scenario::record_scenario;

/// The names of a JSON object's members, repeated ones included. `serde_json::Value` would hide
/// repetitions.
fn members(line: &str) -> Vec<String> {
    struct Names(Vec<String>);
    impl<'de> serde::Deserialize<'de> for Names {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Members;
            impl<'de> serde::de::Visitor<'de> for Members {
                type Value = Names;

                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an object")
                }

                fn visit_map<A: serde::de::MapAccess<'de>>(
                    self,
                    mut map: A,
                ) -> Result<Names, A::Error> {
                    let mut names = Vec::new();
                    while let Some((name, _)) = map.next_entry::<String, Value>()? {
                        names.push(name);
                    }
                    Ok(Names(names))
                }
            }
            deserializer.deserialize_map(Members)
        }
    }
    serde_json::from_str::<Names>(line).unwrap_or_else(|error| panic!("{error}: {line}")).0
}

/// A line as CloudWatch stores it: its members, nested members by their path, and the fields that
/// CloudWatch adds.
fn row(stream: &str, line: &str) -> Row {
    fn put(row: &mut Row, name: String, value: Value) {
        match value {
            Value::Array(values) => {
                values
                    .into_iter()
                    .enumerate()
                    .for_each(|(index, value)| put(row, format!("{name}.{index}"), value));
            }
            Value::Object(members) => {
                members
                    .into_iter()
                    .for_each(|(member, value)| put(row, format!("{name}.{member}"), value));
            }
            value => _ = row.insert(name, value),
        }
    }
    let mut row = Row::new();
    let value: Value = serde_json::from_str(line).expect("the text is JSON");
    let Value::Object(all) = value else { panic!("not an object: {line}") };
    row.insert("@timestamp".into(), all["timestamp"].clone());
    row.insert("@message".into(), line.into());
    row.insert("@logStream".into(), stream.into());
    all.into_iter().for_each(|(name, value)| put(&mut row, name, value));
    row
}

#[tokio::test]
async fn every_line_has_only_documented_fields_and_every_documented_query_matches() {
    let page = Page::read();
    let lines = record_scenario().await;

    let mut seen = BTreeSet::new();
    for (_, line) in &lines {
        let members = members(line);
        for member in &members {
            assert!(
                page.fields.contains(member) || page.metrics.contains(member),
                "infra/cloudwatch.md does not document {member:?}: {line}"
            );
            assert_eq!(
                members.iter().filter(|other| *other == member).count(),
                1,
                "{member:?} is repeated: {line}"
            );
        }
        for everywhere in ["timestamp", "level", "message", "target"] {
            assert!(members.iter().any(|member| member == everywhere), "no {everywhere:?}: {line}");
        }
        seen.extend(members);
    }
    let unseen: Vec<&String> = page
        .fields
        .iter()
        .filter(|field| !page.rare.contains(*field) && !seen.contains(*field))
        .collect();
    assert!(
        unseen.is_empty(),
        "no line has {unseen:?}: correct infra/cloudwatch.md, or mark them there as rare"
    );
    // No process of the scenario runs for a minute, so none writes a heartbeat.
    let unseen =
        page.metrics.iter().filter(|metric| !seen.contains(*metric) && *metric != "Heartbeat");
    let unseen: Vec<&String> = unseen.collect();
    assert!(unseen.is_empty(), "no line has the metrics {unseen:?}");

    let rows: Vec<Row> = lines.iter().map(|(stream, line)| row(stream, line)).collect();
    for (heading, query) in &page.queries {
        let found = insights::run(query, &rows)
            .unwrap_or_else(|error| panic!("{heading}: {error}\n{query}"));
        assert!(!found.is_empty(), "{heading} finds nothing:\n{query}");
        scenario::check(heading, query, &found);
    }
}

/// Checks the fields that the scenario does not write.
#[test]
fn documented_log_fields_are_exactly_those_the_source_writes() {
    let page = Page::read();
    let written = source::fields();
    assert!(
        written.contains("oldest_queued") && written.contains("alert") && written.len() > 30,
        "{written:?}"
    );
    let unexplained: Vec<&String> =
        written.iter().filter(|field| !page.fields.contains(*field)).collect();
    assert!(unexplained.is_empty(), "infra/cloudwatch.md does not document {unexplained:?}");
    let of_the_log_itself = ["timestamp", "level", "message", "target"];
    let twice: Vec<&str> =
        of_the_log_itself.into_iter().filter(|field| written.contains(*field)).collect();
    assert!(twice.is_empty(), "a line would have {twice:?} twice");
    let of_every_line = [&of_the_log_itself[..], &["Service", "Projector", "_aws"]].concat();
    let unwritten: Vec<&String> = page
        .fields
        .iter()
        .filter(|field| !written.contains(*field) && !of_every_line.contains(&field.as_str()))
        .collect();
    assert!(
        unwritten.is_empty(),
        "infra/cloudwatch.md documents {unwritten:?}, which no code writes"
    );
}

/// Tests the evaluator itself. If it matched every line, every query would pass.
#[test]
fn the_query_evaluator_matches_lines_and_refuses_unknown_fields() {
    let line = |at: u32, level: &str, n: u32| {
        row(
            "s",
            &format!(
                r#"{{"timestamp":"2026-01-01T00:0{at}:00Z","level":"{level}","n":{n},"v":[{n},1]}}"#
            ),
        )
    };
    let mut lines = vec![line(1, "INFO", 5), line(2, "WARN", 7), line(8, "WARN", 3)];
    lines.push(row("s", r#"{"timestamp":"2026-01-01T00:09:00Z","level":"ERROR"}"#));
    let run = |query: &str| insights::run(query, &lines);
    let numbers = |query: &str, field: &str| -> Vec<f64> {
        run(query).expect(query).iter().filter_map(|row| row.get(field)?.as_f64()).collect()
    };
    assert_eq!(numbers("filter level = \"WARN\" | sort n asc", "n"), [3.0, 7.0]);
    assert_eq!(numbers("filter not level = \"WARN\" and ispresent(n)", "n"), [5.0]);
    assert_eq!(numbers("filter n > 3 and (level like \"IN\" or n < 6) | limit 5", "n"), [5.0]);
    assert_eq!(numbers("filter level in [\"INFO\", \"WARN\"] | sort n desc | limit 1", "n"), [7.0]);
    assert_eq!(
        numbers("filter ispresent(v.0) | stats max(v.0) as m by bin(5m) as b | sort b asc", "m"),
        [7.0, 3.0]
    );
    assert_eq!(
        numbers("stats count(*) as c, latest(n) as l by level | sort level asc", "c"),
        [1.0, 1.0, 2.0]
    );
    assert_eq!(
        numbers("filter level = \"WARN\" | stats latest(n) as l, sum(n) as s by level", "l"),
        [3.0]
    );
    for wrong in [
        "filter ispresent(m)",
        "stats max(m) as x",
        "stats max(n) as x | sort n asc",
        "fields n | grep level",
        "filter n",
        "filter n ~ 3",
        "stats median(n) as x",
        "limit ten",
    ] {
        assert!(run(wrong).is_err(), "{wrong}");
    }
}
