//! Reads the tables and queries of `infra/cloudwatch.md`.

use std::collections::BTreeSet;

pub struct Page {
    /// Every documented field.
    pub fields: BTreeSet<String>,
    /// The fields that are documented as rare.
    pub rare: BTreeSet<String>,
    pub metrics: BTreeSet<String>,
    /// Each query with the heading above it.
    pub queries: Vec<(String, String)>,
}

impl Page {
    pub fn read() -> Self {
        let text = include_str!("../../../../infra/cloudwatch.md");
        let section = |heading: &str| {
            let after = text
                .split_once(&format!("\n## {heading}\n"))
                .unwrap_or_else(|| panic!("no section {heading}"))
                .1;
            after.split_once("\n## ").map_or(after, |(section, _)| section)
        };
        let mut fields = BTreeSet::new();
        let mut rare = BTreeSet::new();
        for cells in rows(section("Fields")) {
            let names: Vec<String> =
                cells[0].split_whitespace().map(|name| name.trim_matches('`').to_owned()).collect();
            if cells[2].starts_with("rare: ") {
                rare.extend(names.iter().cloned());
            }
            fields.extend(names);
        }
        let metrics =
            rows(section("Metrics")).map(|cells| cells[0].trim_matches('`').to_owned()).collect();
        let mut queries = Vec::new();
        let mut heading = "";
        let mut query: Option<String> = None;
        for line in section("Questions").lines() {
            if let Some(title) = line.strip_prefix("### ") {
                heading = title;
            } else if line == "```" {
                match query.take() {
                    Some(whole) => queries.push((heading.to_owned(), whole)),
                    None => query = Some(String::new()),
                }
            } else if let Some(query) = &mut query {
                query.push_str(line);
                query.push('\n');
            }
        }
        assert!(
            fields.len() > 20 && metrics_are_there(&metrics) && queries.len() > 10,
            "infra/cloudwatch.md has another structure than this test expects"
        );
        Page { fields, rare, metrics, queries }
    }
}

fn metrics_are_there(metrics: &BTreeSet<String>) -> bool {
    metrics.contains("Heartbeat") && metrics.len() > 10
}

/// The rows of a table, without its header.
fn rows(section: &str) -> impl Iterator<Item = Vec<&str>> {
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|line| line.trim_matches('|').split(" | ").map(str::trim).collect())
}
