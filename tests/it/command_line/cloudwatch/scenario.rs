//! A scenario that produces nearly every log line, with the shipped binary as real processes, and
//! the expected result of each query of the page.

use serde_json::json;

use super::insights::Row;
use crate::command_line::{close_gate, failing_at, gated, tally, tally_with};
use crate::support::{FinishedProcess, Folder, Session, World, eventually, execute, kill};

/// The log lines of all processes, each with the name of its log stream.
type Lines = Vec<(String, String)>;

fn collect_lines(lines: &mut Lines, stream: &str, finished: &FinishedProcess) {
    lines.extend(finished.stderr.lines().map(|line| (stream.to_owned(), line.to_owned())));
}

pub async fn record_scenario() -> Lines {
    let world = World::new().await;
    let mut lines = Lines::new();
    let folder =
        Folder::new().with("1.toml", &tally("a")).with("2.toml", &failing_at("poisoned", 55));
    let at = |release: &'static str, command: &[&'static str]| -> Vec<String> {
        let options = [
            "--metrics=emf",
            "--service=shop",
            "--release",
            release,
            "--projectors",
            folder.path(),
        ];
        command.iter().chain(&options).map(|word| (*word).to_owned()).collect()
    };
    let run =
        async |lines: &mut Lines, code: i32, release: &'static str, command: &[&'static str]| {
            let arguments = at(release, command);
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            collect_lines(
                lines,
                &format!("{}/{release}", command[0]),
                &world.run(&arguments).await.exits(code),
            );
        };
    let play = ["play", "--until-idle", "--message-events=10", "--reconcile-after=60"];

    // A projector breaks in play, and again in the boot of the next release.
    world.append(40).await;
    run(&mut lines, 0, "v1", &["boot"]).await;
    world.append(20).await;
    run(&mut lines, 1, "v1", &play).await;
    folder.write("3.toml", &tally("late"));
    run(&mut lines, 1, "v2", &["boot"]).await;

    // The broken projector is repaired. One new projector runs once, and one can be blocked at the
    // gate.
    let mut gate = close_gate(&world).await;
    execute(&mut gate, "rollback").await;
    folder.write("2.toml", &tally("poisoned"));
    folder.write("4.toml", &tally_with("one_time", "mode = 'once'", ":position"));
    folder.write("5.toml", &gated("slow"));
    run(&mut lines, 0, "v3", &["boot"]).await;

    // The queue repeats messages and loses one.
    world.execute("update event_log set published = 43").await;
    world.append(10).await;
    run(&mut lines, 0, "v3", &play).await;
    world.append(5).await;

    // Meanwhile, the table of a projector takes no rows for some seconds.
    world.execute("create table refusing select 1 as n").await;
    world
        .execute(
            "create trigger refuse before insert on late for each row \
             if exists (select 1 from refusing) then \
             signal sqlstate 'HY000' set mysql_errno = 1205, message_text = 'Lock wait timeout'; \
             end if",
        )
        .await;
    let arguments = at(
        "v3",
        &["play", "--until-idle", "--no-relay", "--reconcile-after=1", "--retry-alert-after=1"],
    );
    let playing = world.start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    playing.wait_for_log("projector_retrying").await;
    world.execute("delete from refusing").await;
    collect_lines(&mut lines, "play/v3", &playing.finish().await.exits(0));

    // The queue has a foreign message, and it differs from the queue to which the log was
    // published.
    let send = world
        .sqs
        .send_message()
        .queue_url(&world.queue_url)
        .message_body("hello")
        .message_group_id("other");
    send.message_deduplication_id("1").send().await.expect("the message is sent");
    world.execute("update event_log set queue = 'arn:aws:sqs:us-east-1:000000000000:before'").await;
    run(&mut lines, 1, "v3", &play).await;
    world.sqs.purge_queue().queue_url(&world.queue_url).send().await.expect("the queue is purged");

    // A session is killed during a handler. The retried handler then waits longer than the other
    // projectors wait for it.
    execute(&mut gate, "start transaction").await;
    execute(&mut gate, "select n from gate for update").await;
    let arguments = at(
        "v3",
        &["play", "--background-after-seconds=1", "--receive-wait=1", "--message-events=10"],
    );
    let playing = world.start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    world.append(5).await;
    let waits = |session: &Session| session.statement.starts_with("update gate");
    eventually("a session is killed during a handler", async || {
        kill(&mut world.connection().await, world.sessions().await.into_iter().filter(waits)).await;
        playing.has_logged("\"attempt\":2")
    })
    .await;
    playing.wait_for_log("moves to the background").await;
    playing.wait_for_log("a slow receive").await;
    execute(&mut gate, "rollback").await;
    let last = world.last_position().await;
    eventually("the slow projector has caught up", async || world.position("slow").await == last)
        .await;
    collect_lines(&mut lines, "play/v3", &playing.terminate().await.exits(0));

    // A gap blocks the mark, and a row below the mark is deleted.
    world.execute("alter table events auto_increment = 90000").await;
    world.append(1).await;
    run(&mut lines, 0, "v3", &["relay", "--once"]).await;
    let arguments = at("v3", &["relay"]);
    let relay = world.start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    relay.wait_for_log("publishing").await;
    relay.wait_for_log("high_water_blocked").await;
    let relayed = relay.terminate().await.exits(0);
    let ages: Vec<f64> = relayed.log().iter().filter_map(|line| line["GapAge"].as_f64()).collect();
    assert!(ages.last().is_some_and(|age| *age > 0.0), "the gap must have an age: {ages:?}");
    collect_lines(&mut lines, "relay/v3", &relayed);
    world.execute("delete from events where position = 7").await;
    run(&mut lines, 1, "v3", &["audit"]).await;
    lines
}

/// Asserts the result of a query over the scenario.
pub fn check(heading: &str, query: &str, found: &[Row]) {
    let text = |row: &Row, field: &str| {
        row.get(field).and_then(|value| value.as_str()).unwrap_or("-").to_owned()
    };
    let number =
        |row: &Row, field: &str| row.get(field).and_then(|value| value.as_f64()).unwrap_or(-1.0);
    let all = |fields: &[&str]| -> Vec<String> {
        found
            .iter()
            .map(|row| fields.iter().map(|field| text(row, field)).collect::<Vec<_>>().join(" "))
            .collect()
    };
    match heading {
        "Which projector broke, and on what?" => {
            assert_eq!(
                all(&["projector", "event_type", "release"]),
                ["poisoned@1 Closed v2", "poisoned@1 Closed v1"]
            );
            for broken in found {
                assert_eq!(number(broken, "position"), 55.0);
                assert!(
                    text(broken, "error").contains("2.toml:7") && broken.contains_key("host"),
                    "{broken:?}"
                );
                assert!(
                    number(broken, "attempts") >= 2.0 && text(broken, "event_id").len() == 36,
                    "{broken:?}"
                );
            }
        }
        "Which projector retries, and why?" => {
            assert_eq!(
                all(&["alert", "projector"]),
                ["projector_recovered late@1", "projector_retrying late@1"]
            );
            assert!(text(&found[1], "error").contains("1205"), "{found:?}");
        }
        "How far behind is each projector?" => {
            let mut projectors = all(&["Service", "Projector"]);
            projectors.sort();
            assert_eq!(projectors, ["shop a@1", "shop late@1", "shop poisoned@1", "shop slow@1"]);
            assert!(found.iter().all(|row| number(row, "lag_events") == 0.0), "{found:?}");
        }
        "How long did each boot take?" if query.contains("projector,") => {
            let mut released = all(&["release", "projector", "status"]);
            released.sort();
            let expected = [
                "v1 a@1 live",
                "v1 poisoned@1 live",
                // The broken projector does not prevent the release of a new one.
                "v2 late@1 live",
                "v3 one_time@1 finished",
                "v3 poisoned@1 live",
                "v3 slow@1 live",
            ];
            assert_eq!(released, expected);
            assert!(found.iter().all(|row| number(row, "seconds") >= 0.0), "{found:?}");
            let of = |projector: &str| {
                found
                    .iter()
                    .find(|row| row["projector"] == projector)
                    .expect("the projector has a row")
            };
            assert_eq!(
                (number(of("poisoned@1"), "events"), number(of("slow@1"), "events")),
                (6.0, 60.0)
            );
        }
        "How long did each boot take?" => {
            assert_eq!(all(&["release", "broken"]), ["v3 -", "v2 poisoned@1", "v1 -"]);
            let released: Vec<_> = found.iter().map(|row| row["released"].clone()).collect();
            assert_eq!(released, [json!(true), json!(false), json!(true)]);
            assert_eq!(
                (number(&found[0], "projectors"), number(&found[2], "projectors")),
                (5.0, 2.0)
            );
            assert!(found.iter().all(|row| number(row, "seconds") >= 0.0), "{found:?}");
        }
        "What did a deploy do?" => {
            let steps = all(&["release", "projector", "status"]);
            let v2: Vec<&str> = steps.iter().filter_map(|step| step.strip_prefix("v2 ")).collect();
            assert_eq!(
                v2,
                ["poisoned@1 broken", "late@1 booting", "poisoned@1 broken", "late@1 live", "- -"]
            );
        }
        "What was retried?" => {
            let of_slow = found
                .iter()
                .find(|row| text(row, "projector") == "slow@1")
                .expect("the slow projector was retried");
            assert!(
                number(of_slow, "attempts") >= 2.0 && number(of_slow, "lines") >= 1.0,
                "{of_slow:?}"
            );
            assert_ne!(text(of_slow, "last_error"), "-");
        }
        "What held the mark?" => {
            assert_eq!(found.len(), 2, "both relays must report the gap");
            assert!(
                found
                    .iter()
                    .all(|row| (number(row, "first"), number(row, "last")) == (81.0, 89_999.0)),
                "{found:?}"
            );
        }
        "Which receive was slow?" if query.contains("@logStream") => {
            let receive = found
                .iter()
                .find(|row| row.contains_key("messages"))
                .expect("a slow receive is found");
            assert!(
                number(receive, "seconds") >= 1.0 && number(receive, "messages") >= 1.0,
                "{receive:?}"
            );
            assert_eq!(text(receive, "@logStream"), "play/v3");
            assert!(found.iter().any(|row| text(row, "projector") == "slow@1"), "{found:?}");
        }
        "Which receive was slow?" => {
            assert!(found.iter().any(|row| number(row, "longest") >= 1_000.0), "{found:?}");
        }
        "What did the queue not bring, and what did it bring twice?" => {
            let of = |projector: &str| {
                found
                    .iter()
                    .find(|row| row["Projector"] == projector)
                    .expect("the projector has a row")
            };
            assert!(
                number(of("a@1"), "reads") >= 1.0 && number(of("a@1"), "skipped") >= 17.0,
                "{found:?}"
            );
        }
        "Which projector is slow?" => {
            assert_eq!(found.len(), 5, "{found:?}");
            let of = |projector: &str| {
                found
                    .iter()
                    .find(|row| row["Projector"] == projector)
                    .expect("the projector has a row")
            };
            // `a` applied every event up to the gap once, however often messages arrived.
            // `poisoned` applied its events in three boots and one play.
            assert_eq!(
                (number(of("a@1"), "applied"), number(of("poisoned@1"), "applied")),
                (80.0, 80.0)
            );
            assert!(
                number(of("poisoned@1"), "failures") >= 3.0 && number(of("a@1"), "longest") > 0.0,
                "{found:?}"
            );
        }
        "Is anything wrong with the log?" => {
            assert!(
                found.iter().any(|row| text(row, "fault").contains("position 7 has no row")),
                "{found:?}"
            );
        }
        "Which messages are not ours?" => {
            let mut alerts = all(&["alert", "reasons", "published_to"]);
            alerts.sort();
            let expected = [
                "foreign_messages 1 not readable -",
                "queue_changed - arn:aws:sqs:us-east-1:000000000000:before",
            ];
            assert_eq!(alerts, expected);
            for row in found {
                assert!(text(row, "queue").ends_with(".fifo"), "{row:?}");
            }
            let foreign = found
                .iter()
                .find(|row| row.contains_key("reasons"))
                .expect("the foreign message has a row");
            assert!(
                number(foreign, "messages") == 1.0 && text(foreign, "example").len() == 36,
                "{foreign:?}"
            );
        }
        "What else went wrong?" => {
            assert!(
                found.iter().any(|row| text(row, "level") == "ERROR"
                    && text(row, "message") == "projector broken")
            );
            assert!(
                found
                    .iter()
                    .all(|row| number(row, "lines") >= 1.0 && text(row, "last_seen") != "-"),
                "{found:?}"
            );
        }
        other => panic!("no expected result for {other:?}: add it here"),
    }
}
