//! Every name in the templates is one that the code has; nothing here needs a server.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::{MetricFilter, file, resources, template, value};

/// All of src/, as text.
fn source() -> String {
    fn read(folder: &Path, text: &mut String) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => read(&path, text),
                false => text.push_str(&fs::read_to_string(path).expect("text")),
            }
        }
    }
    let mut text = String::new();
    read(&file("src"), &mut text);
    text
}

/// Asserts that the code has this name, as a string.
#[track_caller]
fn assert_known(source: &str, name: &str) {
    assert!(has(source, name), "a template names {name:?}, which the code does not have");
}

fn has(source: &str, name: &str) -> bool {
    source.contains(&format!("\"{name}\""))
}

/// What comes after each of these words, up to a quotation mark.
fn quoted<'a>(text: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(before).skip(1).filter_map(|rest| rest.split(['"', '\\']).next())
}

#[test]
fn every_metric_in_an_alarm_or_the_dashboard_is_written_by_the_code() {
    let (source, monitoring) = (source(), template("monitoring.yaml"));
    let filters = MetricFilter::all();
    let of_filter = |name: &str| filters.iter().any(|filter| filter.metric == name);
    let mut alarms = 0;
    for alarm in resources(&monitoring, "AWS::CloudWatch::Alarm") {
        alarms += 1;
        let (namespace, metric) = (value(alarm, "Namespace"), value(alarm, "MetricName"));
        match namespace {
            "Projectionist" => {
                assert_known(&source, metric);
                assert!(
                    alarm.contains("Dimensions: [{Name: Service, Value: !Ref Service}]"),
                    "as it is written: {alarm}"
                );
            }
            "AWS/SQS" => assert!(alarm.contains("Dimensions: [{Name: QueueName,"), "{alarm}"),
            "!Sub Projectionist/${Service" => {
                assert!(of_filter(metric), "no filter makes {metric}")
            }
            other => panic!("an alarm on {other:?}"),
        }
    }
    assert_eq!(alarms, 10);

    let shown: BTreeSet<&str> = quoted(&monitoring, "MetricName=\\\"")
        .chain(quoted(&monitoring, "[\"Projectionist\", \""))
        .collect();
    assert!(shown.len() >= 12, "{shown:?}");
    shown.iter().for_each(|metric| assert_known(&source, metric));
    let counted: Vec<&str> = quoted(&monitoring, "[\"Projectionist/${Service}\", \"").collect();
    assert!(counted.len() == 6 && counted.iter().all(|metric| of_filter(metric)), "{counted:?}");
}

#[test]
fn every_alert_has_a_metric_filter_and_an_alarm_and_every_filter_an_alert() {
    let (source, monitoring) = (source(), template("monitoring.yaml"));
    let alerts: BTreeSet<&str> = quoted(&source, "alert = \"").collect();
    let filters = MetricFilter::all();
    let filtered: BTreeSet<&str> = filters.iter().map(|filter| filter.equals.as_str()).collect();
    assert!(alerts.len() >= 4, "the code has alerts: {alerts:?}");
    assert_eq!(filtered, alerts);
    for filter in &filters {
        assert_eq!(filter.field, "alert");
        let camel: String = filter
            .equals
            .split('_')
            .map(|word| format!("{}{}", word[..1].to_uppercase(), &word[1..]))
            .collect();
        assert_eq!(filter.metric, camel, "the metric is called as the alert is");
        // The mark is held for as long as it is, and its alert is one line at the beginning.
        let told_by = if filter.metric == "HighWaterBlocked" { "GapAge" } else { &filter.metric };
        let mut alarms = resources(&monitoring, "AWS::CloudWatch::Alarm");
        assert!(
            alarms.any(|alarm| value(alarm, "MetricName") == told_by),
            "nobody is told of {}",
            filter.metric
        );
    }
}

#[test]
fn every_variable_set_by_a_template_is_read_by_the_program() {
    let source = source();
    let (ecs, lambda) = (template("ecs.yaml"), template("lambda.yaml"));
    let of_ecs = ecs.lines().filter_map(|line| line.split_once("{Name: ")?.1.split(',').next());
    let of_lambda =
        lambda.lines().filter_map(|line| line.trim().split_once(':').map(|(name, _)| name));
    let is_variable = |name: &&str| name.starts_with("PROJECT") || name.ends_with("_URL");
    let set: BTreeSet<&str> = of_ecs.chain(of_lambda).filter(is_variable).collect();
    assert!(set.len() >= 12, "{set:?}");
    set.iter().for_each(|variable| assert_known(&source, variable));
}

#[test]
fn the_timeouts_in_the_templates_are_consistent() {
    let number =
        |text: &str| -> u64 { text.parse().unwrap_or_else(|_| panic!("{text:?} is a number")) };
    let (queue, ecs, lambda) =
        (template("queue.yaml"), template("ecs.yaml"), template("lambda.yaml"));
    let grace = value(&ecs, "{Name: PROJECTIONIST_GRACE_PERIOD, Value");
    assert!(
        number(value(&ecs, "StopTimeout")) >= number(grace) + 15,
        "a worker has time to end, and to hand messages back"
    );

    let timeout = number(value(&lambda, "      Timeout"));
    let (_, visibility) = queue.split_once("  VisibilityTimeout:\n").expect("a parameter");
    assert!(number(value(visibility, "Default")) >= 6 * timeout, "as AWS advises for Lambda");
    assert!(
        timeout >= 4 * number(value(&lambda, "PROJECTIONIST_HANDLER_TIMEOUT")) + 2,
        "an endless handler is found out"
    );
}

#[test]
fn a_wrong_name_is_detected() {
    let source = source();
    assert!(!has(&source, "LagSecond"), "not by a part of it");
    assert!(std::panic::catch_unwind(|| assert_known(&source, "LagMinutes")).is_err());
}

/// What it does on LocalStack is shown in stacks.rs; this LocalStack makes no function.
#[test]
fn every_relay_stack_names_the_role_that_may_send() {
    let queue = template("queue.yaml");
    assert!(
        queue.contains(r#"ArnNotEquals: {aws:PrincipalArn: !Split [",", !Ref SenderRoleArns]}"#)
    );
    for stack in ["ecs.yaml", "lambda.yaml"] {
        let template = template(stack);
        let (_, outputs) = template.split_once("\nOutputs:\n").expect("outputs");
        let (_, output) = outputs
            .split_once("  RelayRoleArn:\n")
            .unwrap_or_else(|| panic!("{stack} names no role"));
        let role = value(output, "Value").trim_start_matches("!GetAtt ").trim_end_matches(".Arn");
        let (_, of_role) = template
            .split_once(&format!("\n  {role}:\n    Type: AWS::IAM::Role\n"))
            .expect("a role");
        let policy = match of_role.split_once("\n  Policy:\n") {
            Some((_, policy)) => policy,
            None => of_role,
        };
        assert!(policy.contains("sqs:SendMessage"), "the role of {stack} is not the relay's");
    }
    let readme = template("README.md");
    assert!(readme.contains("SenderRoleArns=$relay"), "the README says how");
}
