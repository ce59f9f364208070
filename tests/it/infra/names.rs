//! Every name in the templates exists in the code. These tests need no server.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::{MetricFilter, file, resources, template, value};

/// The text of all files in src/.
fn source() -> String {
    fn read(folder: &Path, text: &mut String) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                read(&path, text);
            } else {
                text.push_str(&fs::read_to_string(path).expect("text"));
            }
        }
    }
    let mut text = String::new();
    read(&file("src"), &mut text);
    text
}

/// Asserts that the code contains `name` as a string literal.
#[track_caller]
fn assert_known(source: &str, name: &str) {
    assert!(has(source, name), "a template uses the name {name:?}, which is not a string in src/");
}

fn has(source: &str, name: &str) -> bool {
    source.contains(&format!("\"{name}\""))
}

/// The text after each occurrence of `before`, up to a quotation mark or a backslash.
fn quoted<'a>(text: &'a str, before: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(before).skip(1).filter_map(|rest| rest.split(['"', '\\']).next())
}

#[test]
fn every_metric_in_an_alarm_or_the_dashboard_is_written_by_the_code() {
    let (source, monitoring) = (source(), template("monitoring.yaml"));
    let filters = MetricFilter::all();
    let is_from_filter = |name: &str| filters.iter().any(|filter| filter.metric == name);
    let mut alarms = 0;
    for alarm in resources(&monitoring, "AWS::CloudWatch::Alarm") {
        alarms += 1;
        let (namespace, metric) = (value(alarm, "Namespace"), value(alarm, "MetricName"));
        match namespace {
            "Projectionist" => {
                assert_known(&source, metric);
                assert!(
                    alarm.contains("Dimensions: [{Name: Service, Value: !Ref Service}]"),
                    "the code writes this dimension: {alarm}"
                );
            }
            "AWS/SQS" => assert!(alarm.contains("Dimensions: [{Name: QueueName,"), "{alarm}"),
            "!Sub Projectionist/${Service" => {
                assert!(is_from_filter(metric), "no metric filter creates {metric}")
            }
            other => panic!("an alarm on the unknown namespace {other:?}"),
        }
    }
    assert_eq!(alarms, 11);

    let shown: BTreeSet<&str> = quoted(&monitoring, "MetricName=\\\"")
        .chain(quoted(&monitoring, "[\"Projectionist\", \""))
        .collect();
    assert!(shown.len() >= 12, "{shown:?}");
    shown.iter().for_each(|metric| assert_known(&source, metric));
    let counted: Vec<&str> = quoted(&monitoring, "[\"Projectionist/${Service}\", \"").collect();
    assert!(
        counted.len() == 8 && counted.iter().all(|metric| is_from_filter(metric)),
        "{counted:?}"
    );
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
        assert_eq!(filter.metric, camel, "the metric has the name of the alert");
        // These alerts are logged once, at the beginning or at the end of a state. Their alarms use
        // gauges, which last for as long as the state does.
        let alarm_metric = match filter.metric.as_str() {
            "HighWaterBlocked" => "GapAge",
            "ProjectorBroken" => "StoppedProjectors",
            "ProjectorRetrying" | "ProjectorRecovered" => "RetryingProjectors",
            of_filter => of_filter,
        };
        let mut alarms = resources(&monitoring, "AWS::CloudWatch::Alarm");
        assert!(
            alarms.any(|alarm| value(alarm, "MetricName") == alarm_metric),
            "no alarm uses the metric {}",
            filter.metric
        );
    }
}

#[test]
fn every_variable_set_by_a_template_is_read_by_the_program() {
    let source = source();
    let (ecs, lambda) = (template("ecs.yaml"), template("lambda.yaml"));
    let in_ecs = ecs.lines().filter_map(|line| line.split_once("{Name: ")?.1.split(',').next());
    let in_lambda =
        lambda.lines().filter_map(|line| line.trim().split_once(':').map(|(name, _)| name));
    let is_variable = |name: &&str| name.starts_with("PROJECT") || name.ends_with("_URL");
    let set: BTreeSet<&str> = in_ecs.chain(in_lambda).filter(is_variable).collect();
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
        "a worker needs time to stop and to release its messages"
    );

    let timeout = number(value(&lambda, "      Timeout"));
    let (_, visibility) = queue.split_once("  VisibilityTimeout:\n").expect("a parameter");
    assert!(
        number(value(visibility, "Default")) >= 6 * timeout,
        "AWS recommends six times the timeout of the function"
    );
    assert!(
        timeout >= 4 * number(value(&lambda, "PROJECTIONIST_HANDLER_TIMEOUT")) + 2,
        "an invocation must last longer than an endless handler"
    );
}

#[test]
fn a_wrong_name_is_detected() {
    let source = source();
    assert!(!has(&source, "LagSecond"), "a part of a name does not match");
    assert!(std::panic::catch_unwind(|| assert_known(&source, "LagMinutes")).is_err());
}

/// Checks only the templates, because LocalStack does not create the function. The test in
/// stacks.rs shows the effect of the policy on the queue.
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
            .unwrap_or_else(|| panic!("{stack} has no output RelayRoleArn"));
        let role = value(output, "Value").trim_start_matches("!GetAtt ").trim_end_matches(".Arn");
        let (_, role_text) = template
            .split_once(&format!("\n  {role}:\n    Type: AWS::IAM::Role\n"))
            .expect("a role");
        let policy = match role_text.split_once("\n  Policy:\n") {
            Some((_, policy)) => policy,
            None => role_text,
        };
        assert!(policy.contains("sqs:SendMessage"), "the role of {stack} may not send messages");
    }
    let readme = template("README.md");
    assert!(readme.contains("SenderRoleArns=$relay"), "the README shows how to set SenderRoleArns");
}
