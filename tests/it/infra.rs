//! The files of infra/: the templates, the deploy gate, and the commands in its README.

mod alarms;
mod deploy_gate;
mod fake_aws;
mod localstack_cli;
mod names;
mod readme_commands;
mod roles;
mod second_aws;
mod second_implementation;
mod stacks;

use std::fs;
use std::path::{Path, PathBuf};

/// The path of a file in the repository.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn template(name: &str) -> String {
    fs::read_to_string(file("infra").join(name)).expect("a template")
}

/// The resources of type `kind` in a template, as text.
fn resources<'a>(template: &'a str, kind: &'a str) -> impl Iterator<Item = &'a str> {
    all_resources(template).filter(move |(of, _)| *of == kind).map(|(_, block)| block)
}

/// The type and the text of each resource in a template. All templates indent resources equally.
fn all_resources(template: &str) -> impl Iterator<Item = (&str, &str)> {
    let starts =
        |line: &str| line.starts_with("  ") && !line.starts_with("   ") && line.ends_with(':');
    let mut blocks = Vec::new();
    let mut from = 0;
    let mut at = 0;
    for line in template.split_inclusive('\n') {
        if starts(line.trim_end()) || !line.starts_with([' ', '\n', '#']) {
            blocks.push(&template[from..at]);
            from = at;
        }
        at += line.len();
    }
    blocks.push(&template[from..]);
    blocks.into_iter().filter_map(|block| {
        let kind = block.lines().nth(1)?.trim().strip_prefix("Type: AWS::")?;
        let kind_begins = block.find("AWS::")?;
        Some((&block[kind_begins..kind_begins + "AWS::".len() + kind.len()], block))
    })
}

/// The value of `key` in `block`: the text up to a comma, a line end or a closing brace.
fn value<'a>(block: &'a str, key: &str) -> &'a str {
    let (_, rest) =
        block.split_once(&format!("{key}: ")).unwrap_or_else(|| panic!("no {key} in {block}"));
    rest.split([',', '\n', '}']).next().expect("a value").trim().trim_matches(['"', '\''])
}

/// A metric filter of infra/monitoring.yaml.
struct MetricFilter {
    /// The name of a field in a log line.
    field: String,
    /// The text that the field must equal.
    equals: String,
    metric: String,
}

impl MetricFilter {
    /// All metric filters. Each pattern has the form `{ $.FIELD = "TEXT" }`. CloudWatch matches a
    /// log line with it if the line is a JSON object whose string field FIELD equals TEXT.
    /// <https://docs.aws.amazon.com/AmazonCloudWatch/latest/logs/FilterAndPatternSyntax.html>
    fn all() -> Vec<MetricFilter> {
        let template = template("monitoring.yaml");
        let read = |block| {
            let (_, pattern) = str::split_once(block, "FilterPattern: '{ $.")
                .expect("a pattern with one condition");
            let (field, rest) = pattern.split_once(" = \"").expect("a field and a text");
            let (equals, _) = rest.split_once("\" }'\n").expect("the end of the pattern");
            let is_word =
                |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            assert!(
                is_word(field) && is_word(equals),
                "a wildcard or a second condition is not supported: {field} {equals}"
            );
            MetricFilter {
                field: field.into(),
                equals: equals.into(),
                metric: value(block, "MetricName").into(),
            }
        };
        resources(&template, "AWS::Logs::MetricFilter").map(read).collect()
    }

    fn matches(&self, line: &serde_json::Value) -> bool {
        line[self.field.as_str()].as_str() == Some(&self.equals)
    }
}

/// A projector file that writes the same rows as a `Tally`, so that its read model can be compared
/// with the log.
fn tally(name: &str) -> String {
    projector(name, "*", ":position")
}

/// A projector file that fails at the first `Closed` event, because these events have no amount.
/// The fixed file reads the amount as optional.
fn fragile(is_fixed: bool) -> String {
    let amount = if is_fixed { ":payload.amount?" } else { ":payload.amount" };
    projector("fragile", "Closed", &format!("coalesce({amount}, 0) * 0 + :position"))
}

fn projector(name: &str, events: &str, position: &str) -> String {
    format!(
        "name = \"{name}\"\nversion = 1\nmode = \"from_beginning\"\n\
             setup = [\"create table if not exists {name} (seq bigint auto_increment primary key, \
             position bigint unsigned not null)\"]\n\
             teardown = [\"drop table if exists {name}\"]\n\n\
             [[on]]\nevents = [\"{events}\"]\n\
             sql = \"insert into {name} (position) values ({position})\"\n"
    )
}
