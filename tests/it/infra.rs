//! What is in infra/: the templates, the deploy gate, and what its README tells a newcomer to do.

mod deploy_gate;
mod fake_aws;
mod localstack_cli;
mod names;
mod readme_commands;
mod stacks;

use std::fs;
use std::path::{Path, PathBuf};

/// A file of the repository.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn template(name: &str) -> String {
    fs::read_to_string(file("infra").join(name)).expect("a template")
}

/// The resources of this type in a template, as text. All templates have them at the same depth.
fn resources<'a>(template: &'a str, kind: &'a str) -> impl Iterator<Item = &'a str> {
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
    blocks.into_iter().filter(move |block| {
        block.lines().nth(1).is_some_and(|line| line.trim() == format!("Type: {kind}"))
    })
}

/// What stands after this word, on its line or in its braces.
fn value<'a>(block: &'a str, word: &str) -> &'a str {
    let (_, rest) =
        block.split_once(&format!("{word}: ")).unwrap_or_else(|| panic!("no {word} in {block}"));
    rest.split([',', '\n', '}']).next().expect("a value").trim().trim_matches(['"', '\''])
}

/// A metric filter of infra/monitoring.yaml.
struct MetricFilter {
    /// The field of a log line, and the text that it must have.
    field: String,
    equals: String,
    metric: String,
}

impl MetricFilter {
    /// All of them. Their patterns are all of one form, `{ $.FIELD = "TEXT" }`, which CloudWatch
    /// takes for: the line is a JSON object, and its field of that name is a string that equals the
    /// text. <https://docs.aws.amazon.com/AmazonCloudWatch/latest/logs/FilterAndPatternSyntax.html>
    fn all() -> Vec<MetricFilter> {
        let template = template("monitoring.yaml");
        let read = |block| {
            let (_, pattern) =
                str::split_once(block, "FilterPattern: '{ $.").expect("a pattern of our form");
            let (field, rest) = pattern.split_once(" = \"").expect("a field and a text");
            let (equals, _) = rest.split_once("\" }'\n").expect("an end");
            let is_word =
                |text: &str| text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            assert!(
                is_word(field) && is_word(equals),
                "no wildcard, and no second condition: {field} {equals}"
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

/// A projector file that does as a [`Tally`] does, so that its read model can be compared with the
/// log.
fn tally(name: &str) -> String {
    projector(name, "*", ":position")
}

/// Fails at the first event of this type, none of which has an amount; mended, it does without.
fn fragile(is_mended: bool) -> String {
    let amount = if is_mended { ":payload.amount?" } else { ":payload.amount" };
    projector("fragile", "Closed", &format!("coalesce({amount}, 0) * 0 + :position"))
}

fn projector(name: &str, events: &str, position: &str) -> String {
    format!(
        "name = \"{name}\"\nversion = 1\nmode = \"from_beginning\"\nsetup = [\"create table if not exists {name} \
         (seq bigint auto_increment primary key, position bigint unsigned not null)\"]\nteardown = [\"drop table if exists \
         {name}\"]\n\n[[on]]\nevents = [\"{events}\"]\nsql = \"insert into {name} (position) values ({position})\"\n"
    )
}
