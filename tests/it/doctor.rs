//! `doctor`: all checks of a healthy system are ok, and each problem is reported by its check.
//! Server settings are tested beside the code, because the test servers are shared.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use aws_sdk_sqs::types::{MessageSystemAttributeName, QueueAttributeName as Attribute};
use projectionist::Queue;
use projectionist::sqlx::MySqlConnection;

use crate::failover::lock_out_restricted_users;
use crate::grants::grants_of;
use crate::support::{
    FinishedProcess, Folder, RunningProcess, SqsStub, World, execute, is_mariadb,
};

/// Prevents other tests from making the server read-only until the returned connection is dropped.
async fn keep_writable(world: &World) -> MySqlConnection {
    let mut keeper = world.connection().await;
    lock_out_restricted_users(&mut keeper).await;
    keeper
}

/// The checks of a report by name, each with its level and its text (detail and remedy).
fn lines(report: &FinishedProcess) -> BTreeMap<String, (String, String)> {
    let report = report.json();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let checks = report["checks"].as_array().expect("the report has checks").iter();
    checks
        .map(|check| {
            (
                text(&check["name"]),
                (
                    text(&check["level"]),
                    format!("{}; {}", text(&check["detail"]), text(&check["remedy"])),
                ),
            )
        })
        .collect()
}

/// The checks that are not ok, except those that cannot be ok on the test servers.
fn bad(report: &FinishedProcess) -> BTreeMap<String, (String, String)> {
    let mut lines = lines(report);
    lines.retain(|check, (level, _)| level != "ok" && check != "TLS" && check != "durability");
    lines
}

fn checks(lines: &BTreeMap<String, (String, String)>) -> Vec<(&str, &str)> {
    lines.iter().map(|(check, (level, _))| (check.as_str(), level.as_str())).collect()
}

const COUNTER: &str = "name = 'counter'\nversion = 1\nmode = 'from_beginning'\n\
    setup = ['create table if not exists counter (n bigint)']\n\n\
    [[on]]\nevents = ['*']\nsql = 'insert into counter (n) values (:position)'\n";

/// A queue with a dead-letter queue. The second world must outlive the first.
async fn with_dead_letters(receives: u32, dead_is_fifo: bool) -> (World, World) {
    let dead_letters =
        World::with_queue(dead_is_fifo, &[(Attribute::MessageRetentionPeriod, "1209600")]).await;
    let arn = format!(
        "arn:aws:sqs:us-east-1:000000000000:{}",
        dead_letters.queue_url.rsplit('/').next().expect("the URL ends with a name")
    );
    let policy = format!(r#"{{"deadLetterTargetArn":"{arn}","maxReceiveCount":"{receives}"}}"#);
    (World::with_queue(true, &[(Attribute::RedrivePolicy, &policy)]).await, dead_letters)
}

#[tokio::test]
async fn a_healthy_system_has_only_ok_lines_and_is_not_changed() {
    let (world, _dead_letters) = with_dead_letters(5, true).await;
    let _writable = keep_writable(&world).await;
    let folder = Folder::new().with("1.toml", COUNTER);
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.append(5).await;
    world.run(&["relay", "--once"]).await.exits(0);
    let everything = "--for=migrate,append,boot,play,relay,status,audit,retire,fill";
    for _ in 0..3 {
        let report = world
            .run(&["doctor", "--json", everything, "--projectors", folder.path()])
            .await
            .exits(0);
        assert_eq!(bad(&report), BTreeMap::new());
        assert_eq!(report.json()["healthy"], true);
        let lines = lines(&report);
        assert_eq!(lines["durability"].0, "warning", "the test servers do not flush each commit");
        assert_eq!(lines["TLS"].0, if is_mariadb().await { "warning" } else { "note" });
        for check in [
            "database",
            "version",
            "tables",
            "grants for play",
            "queue",
            "redrive",
            "dead letters",
            "SQS clock",
        ] {
            assert_eq!(lines[check].0, "ok", "{check}");
        }
        for action in ["SendMessage", "ReceiveMessage", "DeleteMessage", "ChangeMessageVisibility"]
        {
            assert_eq!(lines[&format!("sqs:{action}")], ("ok".into(), "allowed; ".into()));
        }
        assert_eq!(lines["projector counter@1"].0, "ok");
    }
    assert_eq!(
        world.queue.depth().await.expect("the depth is readable"),
        1,
        "a message was sent or deleted"
    );
    let received = world.sqs.receive_message().queue_url(&world.queue_url);
    let received = received
        .message_system_attribute_names(MessageSystemAttributeName::All)
        .send()
        .await
        .expect("the queue answers");
    let count = received.messages()[0]
        .attributes()
        .and_then(|all| all.get(&MessageSystemAttributeName::ApproximateReceiveCount));
    assert_eq!(count.map(String::as_str), Some("1"), "the message was received before");
    assert_eq!(world.number("select count(*) from events").await, 5);
    assert_eq!(
        world
            .number(
                "select count(*) from information_schema.tables where table_schema = database()"
            )
            .await,
        6
    );

    // The human-readable report has one line per check.
    let text = world.run(&["doctor", "--projectors", folder.path()]).await.exits(0).stdout;
    assert!(
        text.lines().any(|line| line.starts_with("ok ") && line.contains("projector counter@1")),
        "{text}"
    );
    let standard = World::with_standard_queue().await;
    let report = standard.run(&["doctor", "--json"]).await.exits(0);
    assert_eq!(checks(&bad(&report)), [("dead letters", "note"), ("projectors", "note")]);
    assert!(lines(&report)["queue"].1.contains("standard"));
}

#[tokio::test]
async fn each_missing_grant_is_named() {
    let world = World::new().await;
    let mut admin = keep_writable(&world).await;
    let user = format!("u{:x}", fastrand::u64(..));
    execute(&mut admin, &format!("create user '{user}'@'%' identified by 'x'")).await;
    let url = world.database_url.replace("://root@", &format!("://{user}:x@"));
    let on = |table: &str| format!("{}.{table}", world.database_name);
    for command in
        ["migrate", "append", "boot", "play", "relay", "status", "audit", "retire", "fill"]
    {
        let check = format!("grants for {command}");
        let option = format!("--for={command}");
        let doctor = ["doctor", "--json", &option, "--database-url", &url];
        for (privileges, table) in grants_of(command) {
            execute(
                &mut admin,
                &format!("grant {} on {} to '{user}'@'%'", privileges.join(", "), on(table)),
            )
            .await;
        }
        let report = world.run(&doctor).await.exits(0);
        assert_eq!(lines(&report)[&check].0, "ok", "{command}: {}", report.stdout);
        for (privileges, table) in grants_of(command) {
            for privilege in privileges {
                execute(
                    &mut admin,
                    &format!("revoke {privilege} on {} from '{user}'@'%'", on(table)),
                )
                .await;
                let report = world.run(&doctor).await.exits(2);
                let (level, text) = &lines(&report)[&check];
                assert_eq!(level, "error", "{command} without {privilege} on {table}");
                let named = if table == "*" && privilege != "create" { "events" } else { table };
                assert!(
                    text.starts_with(&format!("missing: {privilege} on {named}")),
                    "{command}, {privilege} on {table}: {text}"
                );
                execute(&mut admin, &format!("grant {privilege} on {} to '{user}'@'%'", on(table)))
                    .await;
            }
        }
        for (privileges, table) in grants_of(command) {
            execute(
                &mut admin,
                &format!("revoke {} on {} from '{user}'@'%'", privileges.join(", "), on(table)),
            )
            .await;
        }
        // Without any privilege on the database, the user cannot connect.
        execute(&mut admin, &format!("grant show view on {} to '{user}'@'%'", on("*"))).await;
    }
    execute(&mut admin, &format!("drop user '{user}'@'%'")).await;
}

#[tokio::test]
async fn an_unmigrated_or_newer_database_is_reported() {
    let world = World::new().await;
    let _writable = keep_writable(&world).await;
    world
        .execute("insert into projectionist_migrations values (9999, 'later', now(), 1, 'x', 1)")
        .await;
    let report = world.run(&["doctor", "--json"]).await.exits(2);
    assert!(lines(&report)["tables"].1.contains("newer release"), "{}", report.stdout);
    for table in
        ["events", "event_log", "projectors", "log_acceptances", "projectionist_migrations"]
    {
        world.execute(&format!("drop table {table}")).await;
    }
    let report = world.run(&["doctor", "--json"]).await.exits(2);
    assert_eq!(report.json()["healthy"], false);
    let bad = bad(&report);
    assert_eq!(
        checks(&bad),
        [("dead letters", "note"), ("projectors", "note"), ("tables", "error")]
    );
    assert!(bad["tables"].1.contains("projectionist migrate"));
    report.prints(&["tables"]);
}

#[tokio::test]
async fn a_log_with_a_missing_beginning_or_end_is_reported() {
    let world = World::new().await;
    let _writable = keep_writable(&world).await;
    world.append(3).await;
    world.run(&["relay", "--once"]).await.exits(0);
    let log = async || lines(&world.run(&["doctor", "--json"]).await)["log"].clone();
    assert_eq!(log().await.0, "ok");
    world.execute("delete from events where position = 3").await;
    let (level, text) = log().await;
    assert!(
        level == "error" && text.contains("the log ends at 2, below the high-water mark 3"),
        "{text}"
    );

    let behind = World::new().await;
    behind.execute("alter table events auto_increment = 5000").await;
    behind.append(1).await;
    let lines = lines(&behind.run(&["doctor", "--json"]).await.exits(0));
    let (level, text) = &lines["log"];
    assert!(
        level == "warning"
            && text.contains("it begins at position 5000")
            && text.contains("history"),
        "{text}"
    );
}

#[tokio::test]
async fn a_read_only_server_is_reported() {
    let world = World::new().await;
    let mut admin = keep_writable(&world).await;
    execute(&mut admin, "set global read_only = 1").await;
    let (doctor, for_status) = (
        world.run(&["doctor", "--json"]).await,
        world.run(&["doctor", "--json", "--for=status"]).await,
    );
    execute(&mut admin, "set global read_only = 0").await;
    let doctor = doctor.exits(2);
    assert!(lines(&doctor)["primary"].1.contains("connect to the primary"), "{}", doctor.stdout);
    assert_eq!(lines(&for_status.exits(0))["primary"].0, "note");
}

#[tokio::test]
async fn each_wrong_attribute_of_the_queue_is_reported() {
    let world = World::with_queue(
        true,
        &[
            (Attribute::VisibilityTimeout, "10"),
            (Attribute::MessageRetentionPeriod, "3600"),
            (Attribute::MaximumMessageSize, "2048"),
            (Attribute::DelaySeconds, "3"),
            (Attribute::SqsManagedSseEnabled, "false"),
        ],
    )
    .await;
    let _writable = keep_writable(&world).await;
    let report = world.run(&["doctor", "--json", "--visibility-timeout=20"]).await.exits(0);
    let expected = [
        ("dead letters", "note"),
        ("delay", "warning"),
        ("encryption", "warning"),
        ("message size", "warning"),
        ("projectors", "note"),
        ("queue visibility timeout", "note"),
        ("retention", "warning"),
        ("visibility timeout", "warning"),
    ];
    assert_eq!(checks(&bad(&report)), expected);

    let (world, dead_letters) = with_dead_letters(1, true).await;
    dead_letters.queue.send("x", "x").await.expect("the message is sent");
    let report = world.run(&["doctor", "--json"]).await.exits(0);
    let bad = bad(&report);
    assert_eq!(
        checks(&bad),
        [("dead letters", "warning"), ("projectors", "note"), ("redrive", "warning")]
    );
    assert!(
        bad["redrive"].1.contains("raise maxReceiveCount")
            && bad["dead letters"].1.contains("has 1 message")
    );
}

#[tokio::test]
async fn projectors_that_do_not_load_or_are_not_live_are_reported() {
    let world = World::new().await;
    let _writable = keep_writable(&world).await;
    let folder = Folder::new().with("1.toml", COUNTER);
    let report = world.run(&["doctor", "--json", "--projectors", folder.path()]).await.exits(0);
    assert_eq!(
        bad(&report)["projector counter@1"],
        ("warning".into(), "not booted, so it is not played; run boot".into())
    );
    let invalid = Folder::new().with("1.toml", "name = 'counter'\nversion = 0\n");
    let report = world.run(&["doctor", "--json", "--projectors", invalid.path()]).await.exits(2);
    assert!(bad(&report)["projectors"].1.contains("1.toml"), "{}", report.stdout);
}

#[tokio::test]
async fn an_unreachable_database_or_queue_is_reported_and_the_rest_still_checked() {
    let world = World::new().await;
    let _writable = keep_writable(&world).await;
    let report = world
        .run(&["doctor", "--json", "--database-url=mysql://root@127.0.0.1:1/x"])
        .await
        .exits(3);
    let both = lines(&report);
    assert_eq!((both["database"].0.as_str(), both["queue"].0.as_str()), ("unreachable", "ok"));
    let gone = world.queue_url.replace("test_", "gone_");
    let report = world.run(&["doctor", "--json", "--queue-url", &gone]).await.exits(3);
    let both = lines(&report);
    assert_eq!((both["database"].0.as_str(), both["queue"].0.as_str()), ("ok", "unreachable"));
    assert!(both["queue"].1.contains("does not exist"));
    let mut nothing = world.command(&["doctor", "--json"]);
    nothing.env_remove("DATABASE_URL").env_remove("QUEUE_URL");
    let report = RunningProcess::spawn(nothing).finish().await.exits(2);
    assert_eq!(checks(&bad(&report)), [("database", "error"), ("queue", "error")]);
    // Boot needs no queue.
    let mut boot = world.command(&["doctor", "--json", "--for=boot"]);
    boot.env_remove("QUEUE_URL");
    assert!(!lines(&RunningProcess::spawn(boot).finish().await.exits(0)).contains_key("queue"));
}

async fn doctor_at(world: &World, stub: &SqsStub) -> FinishedProcess {
    let mut doctor = world.command(&["doctor", "--json"]);
    doctor
        .env("AWS_ENDPOINT_URL", stub.endpoint())
        .env("QUEUE_URL", format!("{}/000000000000/q.fifo", stub.endpoint()));
    RunningProcess::spawn(doctor).finish().await
}

#[tokio::test]
async fn each_missing_sqs_permission_is_named() {
    let world = World::new().await;
    let _writable = keep_writable(&world).await;
    let stub = SqsStub::new().await;
    let expected = [("dead letters", "note"), ("projectors", "note")];
    assert_eq!(checks(&bad(&doctor_at(&world, &stub).await.exits(0))), expected);
    for (action, call) in [
        ("SendMessage", "SendMessageBatch"),
        ("ReceiveMessage", "ReceiveMessage"),
        ("DeleteMessage", "DeleteMessage"),
        ("ChangeMessageVisibility", "ChangeMessageVisibility"),
    ] {
        let stub = SqsStub::new().await;
        stub.deny(call);
        let report = doctor_at(&world, &stub).await.exits(2);
        let check = format!("sqs:{action}");
        assert_eq!(checks(&bad(&report)), [&expected[..], &[(check.as_str(), "error")]].concat());
        assert!(lines(&report)[&check].1.contains(&format!("allow sqs:{action} on the queue")));
    }
    stub.deny("GetQueueAttributes");
    let report = doctor_at(&world, &stub).await.exits(3);
    assert!(
        lines(&report)["queue"].1.contains("allow sqs:GetQueueAttributes"),
        "{}",
        report.stdout
    );
}

/// What SQS answers if the caller may not use the queue's key.
const KEY_DENIED: &str = r#"{"__type":"com.amazonaws.sqs#KmsAccessDenied","message":"User: arn:aws:iam::1:role/task is not authorized to perform: kms:GenerateDataKey on resource: arn:aws:kms:us-east-1:1:key/2"}"#;

#[tokio::test]
async fn a_kms_key_that_may_not_be_used_is_named_with_the_permission() {
    let world = World::new().await;
    let _writable = keep_writable(&world).await;
    world.append(1).await;
    let stub = SqsStub::new().await;
    stub.set_response("SendMessageBatch", 400, KEY_DENIED);
    let report = doctor_at(&world, &stub).await.exits(2);
    let (level, text) = &lines(&report)["sqs:SendMessage"];
    assert_eq!(level, "error");
    for part in ["key/2", "allow kms:GenerateDataKey and kms:Decrypt"] {
        assert!(text.contains(part), "{text}");
    }

    stub.set_response("SendMessage", 400, KEY_DENIED);
    let mut relay = world.command(&["relay", "--once"]);
    relay
        .env("AWS_ENDPOINT_URL", stub.endpoint())
        .env("QUEUE_URL", format!("{}/000000000000/q.fifo", stub.endpoint()));
    let relayed = RunningProcess::spawn(relay).finish().await.exits(3);
    for part in ["key/2", "allow kms:GenerateDataKey and kms:Decrypt"] {
        assert!(relayed.stderr.contains(part), "{}", relayed.stderr);
    }
}

#[tokio::test]
async fn an_endpoint_that_is_not_sqs_is_reported_with_its_status() {
    let world = World::new().await;
    let stub = SqsStub::new().await;
    stub.set_response("GetQueueAttributes", 503, "<html>Service Unavailable</html>");
    let mut relay = world.command(&["relay", "--once"]);
    relay
        .env("AWS_ENDPOINT_URL", stub.endpoint())
        .env("QUEUE_URL", format!("{}/000000000000/q.fifo", stub.endpoint()))
        .env("AWS_MAX_ATTEMPTS", "1");
    let relayed = RunningProcess::spawn(relay).finish().await.exits(3);
    assert!(relayed.stderr.contains("HTTP status 503"), "{}", relayed.stderr);
}

/// The actions on the queue that `doctor` checks for a command.
pub async fn checked_actions(world: &World, command: &str) -> BTreeSet<String> {
    let report = world.run(&["doctor", "--json", &format!("--for={command}")]).await;
    lines(&report).into_keys().filter(|check| check.starts_with("sqs:")).collect()
}

#[tokio::test]
async fn only_the_permissions_of_the_named_commands_are_checked() {
    let world = World::new().await;
    let _writable = keep_writable(&world).await;
    let stub = SqsStub::new().await;
    stub.deny("ChangeMessageVisibility");
    let doctor = async |commands: &str| {
        let mut doctor = world.command(&["doctor", "--json", "--for", commands]);
        doctor
            .env("AWS_ENDPOINT_URL", stub.endpoint())
            .env("QUEUE_URL", format!("{}/000000000000/q.fifo", stub.endpoint()));
        RunningProcess::spawn(doctor).finish().await
    };
    doctor("lambda").await.exits(0);
    doctor("play").await.exits(2);
    stub.deny("ReceiveMessage");
    stub.deny("DeleteMessage");
    doctor("relay").await.exits(0);
    assert_eq!(checks(&bad(&doctor("lambda,relay").await.exits(2))).len(), 4);
    stub.deny("SendMessageBatch");
    doctor("relay").await.exits(2);
    // These commands do not use the queue, even if one is named.
    stub.deny("GetQueueAttributes");
    doctor("boot,migrate,append").await.exits(0);
}

#[tokio::test]
async fn a_clock_far_from_the_sqs_clock_is_reported() {
    let world = World::new().await;
    let _writable = keep_writable(&world).await;
    let stub = SqsStub::new().await;
    stub.set_clock_ahead(Duration::from_secs(200));
    let report = doctor_at(&world, &stub).await.exits(0);
    let (level, text) = &lines(&report)["SQS clock"];
    assert_eq!(level, "warning");
    assert!(text.contains("s ahead of this host's") && text.contains("NTP"), "{text}");
}
