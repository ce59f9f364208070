//! `--metrics emf` with the shipped binary: each line follows the format, and its numbers are
//! correct.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use projectionist::Queue;
use serde_json::{Value, json};

use crate::command_line::{failing_at, tally};
use crate::support::{FinishedProcess, Folder, ProxyAction, RunningProcess, World, eventually};

/// The CloudWatch units that we may use.
const UNITS: [&str; 6] = ["Seconds", "Milliseconds", "Microseconds", "Bytes", "Count", "None"];

/// The metrics lines of a process. Asserts that each follows the format's specification.
fn emf(finished: &FinishedProcess) -> Vec<Value> {
    let lines: Vec<Value> =
        finished.log().into_iter().filter(|line| !line["_aws"].is_null()).collect();
    for (line, text) in
        lines.iter().zip(finished.stderr.lines().filter(|line| line.contains("\"_aws\"")))
    {
        check(line, text);
    }
    lines
}

fn check(line: &Value, text: &str) {
    assert!(text.len() < 1_000_000, "a line may have at most 1 MB");
    let at = line["_aws"]["Timestamp"].as_i64().expect("the timestamp is in milliseconds");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis() as i64;
    assert!((now - 3_600_000..=now).contains(&at), "{at} is not within the last hour");
    let directives = line["_aws"]["CloudWatchMetrics"].as_array().expect("directives");
    assert_eq!(directives.len(), 1);
    for directive in directives {
        assert_eq!(directive["Namespace"], "Projectionist");
        for dimensions in directive["Dimensions"].as_array().expect("sets of dimensions") {
            let dimensions = dimensions.as_array().expect("a set");
            assert!((1..=30).contains(&dimensions.len()));
            for dimension in dimensions {
                let value = line[dimension.as_str().expect("a dimension has a name")]
                    .as_str()
                    .expect("a dimension's value is text");
                assert!(
                    (1..=1024).contains(&value.len())
                        && value.is_ascii()
                        && !value.trim().is_empty()
                );
            }
        }
        let metrics = directive["Metrics"].as_array().expect("metrics");
        assert!((1..=100).contains(&metrics.len()));
        let mut names = BTreeSet::new();
        for metric in metrics {
            let name = metric["Name"].as_str().expect("a metric has a name");
            assert!(names.insert(name), "{name} is repeated");
            assert!(metric["Unit"].as_str().is_some_and(|unit| UNITS.contains(&unit)), "{metric}");
            match &line[name] {
                Value::Number(_) => {}
                Value::Array(values) => {
                    assert!(
                        (1..=100).contains(&values.len()) && values.iter().all(Value::is_number),
                        "{name}: {values:?}"
                    );
                }
                other => panic!("{name} is {other}"),
            }
        }
    }
}

/// The sum of a count over all lines of a projector.
fn sum(lines: &[Value], projector: &str, metric: &str) -> u64 {
    lines
        .iter()
        .filter(|line| line["Projector"] == projector)
        .filter_map(|line| line[metric].as_u64())
        .sum()
}

fn last<'l>(lines: &'l [Value], projector: Option<&str>) -> &'l Value {
    let projector = projector.map_or(Value::Null, Value::from);
    lines.iter().rfind(|line| line["Projector"] == projector).expect("the projector has a line")
}

/// All values of a metric that is sampled or measured for the whole process.
fn values(lines: &[Value], metric: &str) -> Vec<f64> {
    let of = lines.iter().filter_map(|line| line[metric].as_array());
    of.flatten().map(|value| value.as_f64().expect("the value is a number")).collect()
}

#[tokio::test]
async fn applied_failed_skipped_and_reread_events_are_counted_correctly() {
    // A standard queue does not drop repeated messages.
    let world = World::with_standard_queue().await;
    let folder =
        Folder::new().with("1.toml", &tally("a")).with("2.toml", &failing_at("poisoned", 15));
    let run = async |arguments: &[&str]| {
        let options =
            ["--metrics=emf", "--service=shop", "--release=v7", "--projectors", folder.path()];
        world.run(&[arguments, &options].concat()).await
    };
    world.append(10).await;
    let booted = emf(&run(&["boot"]).await.exits(0));
    assert_eq!(
        (sum(&booted, "a@1", "EventsApplied"), sum(&booted, "poisoned@1", "EventsApplied")),
        (10, 10)
    );
    assert_eq!(booted.len(), 2, "a boot must report only its projectors: {booted:?}");
    for line in &booted {
        assert_eq!(
            (&line["Service"], &line["release"], &line["LagEvents"]),
            (&json!("shop"), &json!("v7"), &Value::Null)
        );
        assert!(
            line["ApplyTime"].as_array().is_some_and(|times| times.len() == 1),
            "one batch: {line}"
        );
    }

    // The reconcile interval is long, so only received messages move a projector.
    let play = ["play", "--until-idle", "--message-events=10", "--reconcile-after=3600"];
    world.append(20).await;
    let played = emf(&run(&play).await.exits(1));
    assert_eq!((sum(&played, "a@1", "EventsApplied"), sum(&played, "a@1", "Failures")), (20, 0));
    assert_eq!(
        (sum(&played, "poisoned@1", "EventsApplied"), sum(&played, "poisoned@1", "Failures")),
        (4, 2)
    );
    assert_eq!(values(&played, "RelayBatchSize"), [10.0, 10.0]);
    assert!(matches!(values(&played, "ReceiveToCommit").len(), 1..=2), "{played:?}");
    assert_eq!(
        (&last(&played, Some("a@1"))["LagEvents"], &last(&played, Some("a@1"))["LagSeconds"]),
        (&json!(0), &json!(0.0))
    );
    let poisoned = last(&played, Some("poisoned@1"));
    assert_eq!(poisoned["LagEvents"], 16, "a broken projector falls behind");
    assert!(poisoned["LagSeconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{poisoned}");
    let whole = last(&played, None);
    let metrics = ["HighWaterMark", "Published", "LagSeconds", "GapAge", "Heartbeat"]
        .map(|metric| whole[metric].clone());
    assert_eq!(
        metrics,
        [json!(30), json!(30), json!(0.0), json!(0.0), Value::Null],
        "the lag is that of live projectors, and a process of less than a minute has no heartbeat"
    );

    // The relay sends two messages again.
    world.execute("update event_log set published = 10").await;
    let played = emf(&run(&play).await.exits(0));
    assert_eq!(
        (sum(&played, "a@1", "DuplicatesSkipped"), sum(&played, "a@1", "EventsApplied")),
        (20, 0)
    );
    assert_eq!(
        (sum(&played, "a@1", "FallbackReads"), sum(&played, "poisoned@1", "DuplicatesSkipped")),
        (0, 0)
    );

    // The queue loses a message, so the next one does not continue from the projector's position.
    world.append(10).await;
    run(&["relay", "--once"]).await.exits(0);
    world.sqs.purge_queue().queue_url(&world.queue_url).send().await.expect("the queue is purged");
    world.append(10).await;
    let played = emf(&run(&play).await.exits(0));
    assert_eq!(
        (sum(&played, "a@1", "FallbackReads"), sum(&played, "a@1", "EventsApplied")),
        (1, 20)
    );
    assert_eq!((sum(&played, "a@1", "DuplicatesSkipped"), sum(&played, "a@1", "Failures")), (0, 0));
    assert_eq!(values(&played, "RelayBatchSize"), [10.0]);

    world.append(25).await;
    let relayed = emf(&run(&["relay", "--once", "--message-events=10"]).await.exits(0));
    assert_eq!(relayed.len(), 1, "{relayed:?}");
    let metrics = ["HighWaterMark", "Published", "GapAge", "Heartbeat"]
        .map(|metric| relayed[0][metric].clone());
    assert_eq!(metrics, [json!(75), json!(75), json!(0.0), Value::Null]);
    let mut sizes = values(&relayed, "RelayBatchSize");
    sizes.sort_by(f64::total_cmp);
    assert_eq!(sizes, [5.0, 10.0, 10.0]);
}

#[tokio::test]
async fn an_unresponsive_database_loses_the_lag_metric_and_no_count() {
    let world = World::new().await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let is_silent = Arc::new(AtomicBool::new(false));
    let deciding = Arc::clone(&is_silent);
    let decide = move |_: &[u8]| {
        if deciding.load(Ordering::SeqCst) { ProxyAction::Silent } else { ProxyAction::Forward }
    };
    let mut play = world.command(&[
        "play",
        "--metrics=emf",
        "--receive-wait=1",
        "--grace-period=1",
        "--projectors",
        folder.path(),
    ]);
    play.env("DATABASE_URL", world.database_url_through_proxy(decide).await);
    let play = RunningProcess::spawn(play);
    // Waits for the first report, so that all counts are in the last one.
    play.wait_for_log("HighWaterMark").await;
    world.append(5).await;
    eventually("the events are played", async || world.position("a").await == 5).await;
    eventually("the messages are deleted", async || {
        world.queue.depth().await.is_ok_and(|depth| depth == 0)
    })
    .await;
    is_silent.store(true, Ordering::SeqCst);
    let played = play.terminate().await.exits(0);
    let warns = |line: &Value| {
        line["level"] == "WARN" && line["message"] == "the lag cannot be measured now"
    };
    assert!(played.log().iter().any(warns), "{}", played.stderr);
    let lines = emf(&played);
    assert_eq!(sum(&lines, "a@1", "EventsApplied"), 5);
    assert_eq!(
        (&last(&lines, Some("a@1"))["LagEvents"], &last(&lines, None)["LagSeconds"]),
        (&Value::Null, &Value::Null)
    );
}

#[tokio::test]
async fn metrics_need_their_option_and_are_the_same_with_human_logs() {
    let world = World::new().await;
    world.append(3).await;
    let folder = Folder::new().with("1.toml", &tally("a"));
    let without = world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(emf(&without), Vec::<Value>::new());

    world.append(3).await;
    let human = [
        "play",
        "--until-idle",
        "--metrics=emf",
        "--log-format=human",
        "--log=error",
        "--projectors",
        folder.path(),
    ];
    let human = world.run(&human).await.exits(0);
    let lines: Vec<Value> =
        human.stderr.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    lines.iter().zip(human.stderr.lines()).for_each(|(line, text)| check(line, text));
    assert_eq!(
        sum(&lines, "a@1", "EventsApplied"),
        3,
        "the log's filter must not hide metrics: {}",
        human.stderr
    );
    assert_eq!(last(&lines, None)["Service"], "projectionist");
}

#[tokio::test]
async fn a_service_that_cannot_be_a_dimension_is_refused() {
    let world = World::new().await;
    for wrong in ["--service= ", "--service=:shop", "--service=caf\u{e9}"] {
        world.run(&["status", wrong]).await.exits(2);
    }
}
