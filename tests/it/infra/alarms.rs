//! The alarms of infra/monitoring.yaml, evaluated as CloudWatch does, on what the shipped binary
//! writes.

use std::time::Duration;

use serde_json::Value;

use super::{resources, template, value};
use crate::support::{Folder, Tally, World, execute, schedule, write};

/// The state of an alarm.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum State {
    Ok,
    Alarm,
    /// No minute had data yet.
    Unknown,
}

/// An alarm on a metric that the binary writes.
struct Alarm {
    metric: String,
    sums: bool,
    evaluation_periods: usize,
    is_below: bool,
    threshold: f64,
    missing: String,
}

impl Alarm {
    /// Reads the alarm whose name ends with `name`.
    fn named(name: &str) -> Self {
        let monitoring = template("monitoring.yaml");
        let ends = format!("AlarmName: !Sub ${{Service}}-{name}\n");
        let mut alarms = resources(&monitoring, "AWS::CloudWatch::Alarm");
        let alarm = alarms.find(|alarm| alarm.contains(&ends)).expect("an alarm of this name");
        assert_eq!(value(alarm, "Namespace"), "Projectionist");
        assert_eq!(value(alarm, "Period"), "60");
        let (is_below, or_equal) = match value(alarm, "ComparisonOperator") {
            "GreaterThanThreshold" => (false, false),
            "GreaterThanOrEqualToThreshold" => (false, true),
            "LessThanThreshold" => (true, false),
            other => panic!("{other} is not supported"),
        };
        let threshold = match value(alarm, "Threshold") {
            "!Ref LagSeconds" => 300.0,
            number => number.parse().expect("a number"),
        };
        Alarm {
            metric: value(alarm, "MetricName").into(),
            sums: match value(alarm, "Statistic") {
                "Sum" => true,
                "Maximum" => false,
                other => panic!("{other} is not supported"),
            },
            evaluation_periods: value(alarm, "EvaluationPeriods").parse().expect("a number"),
            is_below,
            // All values are whole numbers or far from the threshold.
            threshold: if or_equal { threshold - 0.5 } else { threshold },
            missing: value(alarm, "TreatMissingData").into(),
        }
    }

    /// The state after these minutes. Each minute has the log lines that were written in it.
    fn state(&self, minutes: &[Vec<Value>]) -> State {
        let mut state = State::Unknown;
        for end in 1..=minutes.len() {
            let window = &minutes[end.saturating_sub(self.evaluation_periods)..end];
            let values: Vec<Option<f64>> =
                window.iter().map(|lines| self.of_minute(lines)).collect();
            let is_breaching = |value: &Option<f64>| match (value, self.missing.as_str()) {
                (Some(value), _) if self.is_below => *value < self.threshold,
                (Some(value), _) => *value > self.threshold,
                (None, "breaching") => true,
                (None, _) => false,
            };
            if self.missing == "ignore" && values.iter().all(Option::is_none) {
                continue;
            }
            let is_raised =
                window.len() == self.evaluation_periods && values.iter().all(is_breaching);
            state = if is_raised { State::Alarm } else { State::Ok };
        }
        state
    }

    /// The value of one minute. Only the lines of the whole service count.
    fn of_minute(&self, lines: &[Value]) -> Option<f64> {
        let of_service =
            lines.iter().filter(|line| line.get("_aws").is_some() && line["Projector"].is_null());
        let values = of_service.filter_map(|line| line[self.metric.as_str()].as_f64());
        values.reduce(|one, other| if self.sums { one + other } else { one.max(other) })
    }
}

/// Runs a new function for one scheduled invocation that ends after `time`. Returns its log lines.
async fn scheduled(world: &World, folder: &Folder, options: &[&str], time: Duration) -> Vec<Value> {
    let common = ["--projectors", folder.path(), "--metrics=emf", "--deadline-margin=500"];
    let mut function = world.function(&[&common, options].concat()).await;
    function.invoke(&schedule(), time).await.expect("an answer");
    function.process.terminate().await.exits(0).log()
}

#[tokio::test]
async fn a_blocked_mark_raises_its_alarm_although_only_functions_run() {
    for relay_seconds in ["--relay-seconds=0", "--relay-seconds=55"] {
        let alarm = Alarm::named("high-water-blocked");
        let world = World::new().await;
        let tally = Tally::new("tally");
        let folder = Folder::new().with("tally.toml", &tally.file(&[]));
        world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
        let mut open = world.connection().await;
        execute(&mut open, "begin").await;
        write(&mut open, "open", 1).await.expect("written");
        world.append(5).await;

        // Each minute has a new function, as after a cold start. The test moves the time of the log
        // instead of waiting.
        let options = [relay_seconds];
        let minute = async || scheduled(&world, &folder, &options, Duration::from_secs(3)).await;
        let mut minutes = vec![minute().await];
        assert_eq!(alarm.state(&minutes), State::Ok, "blocked for seconds: {minutes:?}");
        world
            .execute("update event_log set blocked_since = blocked_since - interval 61 second")
            .await;
        minutes.push(minute().await);
        assert_eq!(alarm.state(&minutes), State::Alarm, "{relay_seconds}: {minutes:?}");
        minutes.push(Vec::new());
        assert_eq!(alarm.state(&minutes), State::Alarm, "a minute without data changes nothing");
        execute(&mut open, "commit").await;
        minutes.push(minute().await);
        assert_eq!(alarm.state(&minutes), State::Ok, "{relay_seconds}: {minutes:?}");
    }
}

#[tokio::test]
async fn heartbeat_and_lag_of_functions_end_their_alarms_and_silence_raises_them() {
    let (heartbeat, lag) = (Alarm::named("no-heartbeat"), Alarm::named("lag"));
    let world = World::new().await;
    let tally = Tally::new("tally");
    let folder = Folder::new().with("tally.toml", &tally.file(&[]));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let silence = vec![Vec::new(); 5];
    assert_eq!((heartbeat.state(&silence), lag.state(&silence)), (State::Alarm, State::Alarm));
    let mut minutes = silence;
    let time = Duration::from_secs(20);
    minutes.push(scheduled(&world, &folder, &["--relay-seconds=0"], time).await);
    assert_eq!((heartbeat.state(&minutes), lag.state(&minutes)), (State::Ok, State::Ok));
    minutes.extend(vec![Vec::new(); 2]);
    assert_eq!(heartbeat.state(&minutes), State::Ok, "two invocations failed");
    minutes.extend(vec![Vec::new(); 3]);
    assert_eq!((heartbeat.state(&minutes), lag.state(&minutes)), (State::Alarm, State::Alarm));
}

#[tokio::test]
async fn the_alarm_of_a_broken_projector_lasts_until_it_is_fixed() {
    let alarm = Alarm::named("projector-broken");
    let world = World::new().await;
    let tally = Tally::new("tally");
    let good = tally.file(&[]);
    let statement = "insert into tally (position) values (:position)";
    let broken =
        good.replace(statement, "insert into tally (position) values (nullif(:position, 3))");
    assert_ne!(good, broken);
    let folder = Folder::new().with("tally.toml", &broken);
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let options = ["play", "--until-idle", "--metrics=emf"];
    let minute = async |folder: &Folder, code| {
        let play = [&options[..], &["--projectors", folder.path()]].concat();
        world.run(&play).await.exits(code).log()
    };
    let mut minutes = vec![minute(&folder, 0).await];
    assert_eq!(alarm.state(&minutes), State::Ok);
    world.append(5).await;
    minutes.push(minute(&folder, 1).await);
    assert_eq!(alarm.state(&minutes), State::Alarm, "{minutes:?}");
    // The alert was logged once. A worker of another release, without this projector, counts it,
    // too.
    let other = Folder::new().with("other.toml", &Tally::new("other").file(&[]));
    world.run(&["boot", "--projectors", other.path()]).await.exits(0);
    for _ in 0..3 {
        minutes.push(minute(&other, 0).await);
        assert_eq!(alarm.state(&minutes), State::Alarm, "{minutes:?}");
    }
    let fixed = Folder::new().with("tally.toml", &good);
    world.run(&["boot", "--projectors", fixed.path()]).await.exits(0);
    minutes.push(minute(&fixed, 0).await);
    assert_eq!(alarm.state(&minutes), State::Ok, "{minutes:?}");
    world.assert_complete(&tally).await;
}
