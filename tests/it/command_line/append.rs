//! `append`: stored events, rejected lines, and the report about both.

use aws_sdk_sqs::types::QueueAttributeName;
use projectionist::Queue;
use projectionist::sqlx;
use serde_json::Value;

use super::{event_count, line, tally_positions, tally_with};
use crate::support::{Folder, World, eventually};

#[tokio::test]
async fn migrate_can_be_repeated_and_loses_nothing() {
    let world = World::new().await;
    world
        .execute(
            "drop table projectors, event_log, events, log_acceptances, projectionist_migrations",
        )
        .await;
    for _ in 0..2 {
        let migrated = world.run(&["migrate"]).await.exits(0);
        assert_eq!(migrated.stdout, "the tables are up to date\n");
        world.run_with(&["append"], line("a").as_bytes()).await.exits(0);
    }
    assert_eq!(event_count(&world).await, 2);
}

#[tokio::test]
async fn a_foreign_table_is_reported_and_migrate_works_once_it_is_gone() {
    let world = World::new().await;
    world
        .execute(
            "drop table projectors, event_log, events, log_acceptances, projectionist_migrations",
        )
        .await;
    world.execute("create table events (of_mine int)").await;
    let refused = world.run(&["migrate"]).await.exits(2);
    assert!(refused.stderr.contains("did not create: events. Rename them"), "{}", refused.stderr);
    world.execute("rename table events to mine").await;
    world.run(&["migrate"]).await.exits(0);
    world.run_with(&["append"], line("a").as_bytes()).await.exits(0);
}

#[tokio::test]
async fn append_prints_the_count_and_last_position_for_every_input() {
    let world = World::new().await;
    // Empty lines are ignored, and the last line needs no line end.
    let lines = format!("{}\n\n   \r\n{}\r\n{}", line("a"), line("b"), line("a"));
    let folder = Folder::new().with("events.jsonl", &lines);
    let from_file = world.run(&["append", &folder.file("events.jsonl")]).await.exits(0);
    assert_eq!(from_file.stdout, "appended 3 events, last position 3\n");
    for arguments in [&["append"][..], &["append", "-"]] {
        let appended = world.run_with(arguments, lines.as_bytes()).await.exits(0);
        assert_eq!(
            appended.stdout,
            format!("appended 3 events, last position {}\n", world.last_position().await)
        );
    }
    let one = world.run_with(&["append"], line("c").as_bytes()).await.exits(0);
    assert_eq!(one.stdout, "appended 1 event, last position 10\n");
    assert_eq!(world.run_with(&["append"], b"\n\n").await.exits(0).stdout, "appended 0 events\n");
    assert_eq!(event_count(&world).await, 10);
}

#[tokio::test]
async fn every_field_on_a_line_is_stored_exactly() {
    let world = World::new().await;
    let given = concat!(
        r#"{"stream_id":"Fall-Größe 😀 \"1\"","event_type":"Ünïcode, \\ and 'quotes'","#,
        r#""event_id":"it's-\\-an:id","stream_version":1,"#,
        r#""recorded_at":"2010-10-02T09:20:39.266001+02:00","#,
        r#""metadata":[ 1.0, {"b":2, "a":"\u00e9"} ],"#,
        r#""payload":{ "z" : 1.50, "a" : "\u0041", "big": 123456789012345678901234567890 }}"#
    );
    let next = concat!(
        r#"{"stream_id":"Fall-Größe 😀 \"1\"","event_type":"Opened","#,
        r#""stream_version":2,"payload":null}"#
    );
    world.run_with(&["append"], format!("{given}\n{next}").as_bytes()).await.exits(0);
    let row: (String, String, String, u64, String, String, String) = sqlx::query_as(
        "select stream_id, event_type, event_id, stream_version, cast(recorded_at as char), \
         payload, metadata \
         from events where position = 1",
    )
    .fetch_one(&mut world.connection().await)
    .await
    .expect("the row exists");
    let expected = (
        "Fall-Größe 😀 \"1\"",
        "Ünïcode, \\ and 'quotes'",
        "it's-\\-an:id",
        1,
        "2010-10-02 07:20:39.266001",
        r#"{ "z" : 1.50, "a" : "\u0041", "big": 123456789012345678901234567890 }"#,
        r#"[ 1.0, {"b":2, "a":"\u00e9"} ]"#,
    );
    let row = (&*row.0, &*row.1, &*row.2, row.3, &*row.4, &*row.5, &*row.6);
    assert_eq!(row, expected);

    let made = "select count(*) from events where position = 2 and stream_version = 2 \
                and payload = 'null' and metadata is null \
                and char_length(event_id) = 36 and abs(timestampdiff(second, recorded_at, \
                utc_timestamp())) < 60";
    assert_eq!(world.number(made).await, 1, "missing fields get defaults");
}

#[tokio::test]
async fn lines_from_an_open_pipe_are_stored_as_they_arrive() {
    let world = World::new().await;
    let mut writer = world.start_piped(&["append"]);
    for count in [1, 3] {
        writer.write(&[line("a"), line("b")][..count.min(2)]).await;
        eventually("the lines are stored", async || event_count(&world).await == count as u64)
            .await;
    }
    assert_eq!(writer.finish().await.exits(0).stdout, "appended 3 events, last position 3\n");
}

/// A rejected line, and a part of the reason.
const BAD_LINES: &[(&[u8], &str)] = &[
    (
        b"{\"stream_id\":\"caf\xe9\",\"event_type\":\"a\",\"payload\":1}",
        "not UTF-8, from byte 18 on",
    ),
    (b"stream_id,event_type,payload", "expected value"),
    (b"{\"stream_id\":\"a\",\"event_type\":\"a\",\"payload\":{\"a\":1}", "EOF while parsing"),
    (b"{\"stream_id\":\"a\",\"event_type\":\"a\"}", "missing field `payload`"),
    (
        b"{\"stream_id\":\"a\",\"event_type\":\"a\",\"payload\":1,\"recordedAt\":\"x\"}",
        "unknown field `recordedAt`",
    ),
    (
        b"{\"stream_id\":\"a\",\"event_type\":\"a\",\"payload\":1,\"recorded_at\":\"yesterday\"}",
        "at column",
    ),
    // This line once made the reader's thread panic, which looked like the end of the input.
    (
        b"{\"stream_id\":\"a\",\"event_type\":\"a\",\"payload\":1,\
          \"recorded_at\":\"9999-12-31T23:59:59-01:00\"}",
        "recorded_at must lie between",
    ),
    (
        b"{\"stream_id\":\"a\",\"event_type\":\"a\\u001b[2J\",\"payload\":1}",
        "has a control character",
    ),
    (b"{\"stream_id\":7,\"event_type\":\"a\",\"payload\":1}", "invalid type: integer"),
    (
        b"{\"stream_id\":\"\",\"event_type\":\"a\",\"payload\":1}",
        "stream_id must be 1 to 200 characters",
    ),
    (b"{\"stream_id\":\"a\",\"event_type\":\"$filler\",\"payload\":1}", "begins with `$`"),
    (
        b"{\"stream_id\":\"a\",\"event_type\":\"a\",\"payload\":1,\"stream_version\":9}",
        "is at version 1",
    ),
    (
        b"{\"stream_id\":\"a\",\"event_type\":\"a\",\"payload\":1,\"event_id\":\"taken\"}",
        "the id \"taken\" is in the log already",
    ),
    (
        b"{\"stream_id\":\"a\",\"event_type\":\"a\",\"payload\":1,\"event_id\":\"twice\"}",
        "the id \"twice\" is in the log already",
    ),
    // Valid JSON for us, but not for the server.
    (
        b"{\"stream_id\":\"a\",\"event_type\":\"a\",\"payload\":\"\\ud800\"}",
        "does not accept its payload or metadata as JSON",
    ),
    (
        b"{\"stream_id\":\"a\",\"event_type\":\"a\",\"payload\":1,\"metadata\":\"\\ud800\"}",
        "events_metadata_is_json",
    ),
];

#[tokio::test]
async fn a_bad_line_is_named_with_its_reason_and_the_count_already_stored() {
    let world = World::new().await;
    let taken = r#"{"stream_id":"other","event_type":"Opened","payload":1,"event_id":"taken"}"#;
    world.run_with(&["append"], taken.as_bytes()).await.exits(0);
    for (number, (bad, reason)) in BAD_LINES.iter().enumerate() {
        world.execute("delete from events where event_id <> 'taken'").await;
        let twice = r#"{"stream_id":"twice","event_type":"Opened","payload":1,"event_id":"twice"}"#;
        let before = format!("{}\n\n{twice}\n", line("a"));
        // Another bad line follows, but only the first is reported.
        let after = format!("\n{}\n{taken}\n", line("after"));
        let input = [before.as_bytes(), bad, after.as_bytes()].concat();
        let finished = world.run_with(&["append"], &input).await.exits(2);
        let last =
            world.number("select max(position) from events where event_type not like '$%'").await;
        let tally = format!(
            "stored before it: 2 events, last position {last}; no event from line 4 on was stored"
        );
        let finished = finished.prints(&["line 4: ", reason, &tally]);
        assert_eq!((finished.stdout.as_str(), event_count(&world).await), ("", 3), "{number}");
        assert_eq!(world.number("select count(*) from events where stream_id = 'after'").await, 0);
    }
}

#[tokio::test]
async fn the_first_bad_event_in_a_transaction_is_named() {
    let world = World::new().await;
    let with =
        |keys: &str| format!(r#"{{"stream_id":"a","event_type":"Opened","payload":1{keys}}}"#);
    let bad = [r#","event_id":"x""#, r#","stream_version":99"#, r#","metadata":"\ud800""#];
    for first in bad {
        for second in bad {
            world.execute("delete from events").await;
            world.run_with(&["append"], with(bad[0]).as_bytes()).await.exits(0);
            let lines =
                [line("b"), line("b"), with(first), line("b"), with(second), line("b")].join("\n");
            world
                .run_with(&["append"], lines.as_bytes())
                .await
                .exits(2)
                .prints(&["line 3: ", "stored before it: 2 events"]);
            assert_eq!(event_count(&world).await, 3, "{first} {second}");
        }
    }
}

#[tokio::test]
async fn a_bad_line_far_into_the_input_has_the_right_number() {
    let world = World::new().await;
    let mut lines = vec![line("a"); 1_200];
    lines[1_100] = r#"{"stream_id":"a","event_type":"Opened","payload":"\ud800"}"#.into();
    let finished = world.run_with(&["append"], lines.join("\n").as_bytes()).await.exits(2);
    finished.prints(&["line 1101: ", "stored before it: 1,100 events"]);
    assert_eq!(event_count(&world).await, 1_100);
    assert_eq!(
        world.number("select max(stream_version) from events where stream_id = 'a'").await,
        1_100
    );
}

#[tokio::test]
async fn a_file_that_cannot_be_read_is_named() {
    let world = World::new().await;
    let folder = Folder::new();
    let missing = folder.file("missing.jsonl");
    world.run(&["append", &missing]).await.exits(2).prints(&[&missing, "No such file"]);
    world.run(&["append", folder.path()]).await.exits(2).prints(&["directory"]);
}

#[tokio::test]
async fn a_2_mb_payload_is_stored_and_sent_as_a_reference() {
    let world = World::new().await;
    let large = format!(
        r#"{{"stream_id":"a","event_type":"Opened","payload":{{"text":"{}"}}}}"#,
        "x".repeat(2_000_000)
    );
    let folder = Folder::new().with(
        "a.toml",
        &tally_with(
            "a",
            "mode = 'from_beginning'",
            "if(char_length(:payload.text?) = 2000000, :position + 1000, :position)",
        ),
    );
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let lines = [line("a"), large, line("a")].join("\n");
    world.run_with(&["append"], lines.as_bytes()).await.exits(0);
    let published = world.run(&["relay", "--once"]).await.exits(0);
    assert_eq!(published.stdout, "published 3 events, up to position 3\n");

    let received =
        world.queue.receive(std::time::Duration::from_secs(5)).await.expect("the queue answers");
    let bodies: Vec<Value> = received
        .iter()
        .map(|message| serde_json::from_str(&message.body).expect("the text is JSON"))
        .collect();
    let reference = bodies.iter().find(|body| body["prev"] == 1).expect("the second event");
    assert_eq!((&reference["last"], reference.get("events")), (&2.into(), None));
    let receipts: Vec<String> = received.into_iter().map(|message| message.receipt).collect();
    world
        .queue
        .change_visibility(&receipts, std::time::Duration::ZERO)
        .await
        .expect("the messages are visible again");

    world.run(&["play", "--until-idle", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(tally_positions(&world, "a").await, [1, 1002, 3]);
}

#[tokio::test]
async fn only_a_payload_larger_than_can_be_stored_is_refused() {
    let world = World::with_queue(true, &[(QueueAttributeName::MaximumMessageSize, "1024")]).await;
    let payload = |bytes: usize| {
        format!(
            r#"{{"stream_id":"a","event_type":"Opened","payload":"{}"}}"#,
            "x".repeat(bytes - 2)
        )
    };
    for (bytes, reason) in
        [(16_777_216, "payload has 16777216 bytes; at most 16777215"), (40_000_000, "longer than")]
    {
        let lines = [line("a"), payload(bytes), line("a")].join("\n");
        world.run_with(&["append"], lines.as_bytes()).await.exits(2).prints(&[
            "line 2: ",
            reason,
            "stored before it: 1 event,",
        ]);
    }
    let appended = world.run_with(&["append"], payload(16_777_215).as_bytes()).await.exits(0);
    assert_eq!(appended.stdout, "appended 1 event, last position 3\n");
    assert_eq!(
        world.number("select length(payload) from events where position = 3").await,
        16_777_215
    );
}
