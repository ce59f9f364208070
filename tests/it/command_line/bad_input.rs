//! Bad input: each error has its own message and exit code. The message says what is wrong, where,
//! and what to do.

use tokio::process::Command;

use super::tally;
use crate::support::{FinishedProcess, Folder, RunningProcess, World, server_url, setting};

/// A command, its expected exit code, and texts that its error must contain.
type Case<'a> = (Command, i32, &'a [&'a str]);

async fn finish(command: Command) -> FinishedProcess {
    RunningProcess::spawn(command).finish().await
}

async fn check(cases: Vec<Case<'_>>) {
    for (command, code, words) in cases {
        eprintln!("{:?}", command.as_std());
        let finished = finish(command).await.exits(code).prints(words);
        assert_eq!(finished.stdout, "", "an error must not be written to standard output");
    }
}

/// The command with one environment variable set or removed.
fn with(mut command: Command, variable: &str, value: Option<&str>) -> Command {
    match value {
        Some(value) => command.env(variable, value),
        None => command.env_remove(variable),
    };
    command
}

#[tokio::test]
async fn an_unusable_database_is_reported_with_address_and_advice() {
    let world = World::new().await;
    let status = |url: Option<&str>| with(world.command(&["status"]), "DATABASE_URL", url);
    let (user, server) = (&world.database_name[..30], server_url().replace("mysql://root@", ""));
    world.execute(&format!("create user '{user}'@'%' identified by 'right'")).await;
    let wrong = format!("mysql://{user}:wr0ng-pass@{server}/{}", world.database_name);
    let unknown = format!("{}/nonesuch", server_url());
    check(vec![
        (status(None), 2, &["no database is named", "--database-url", "DATABASE_URL"]),
        (
            status(Some("mysql://root@127.0.0.1:1/x")),
            3,
            &["root@127.0.0.1:1/x", "Connection refused", "check host and port"],
        ),
        (
            status(Some(&wrong)),
            3,
            &[user, &server, "Access denied", "check the user and the password"],
        ),
        (status(Some(&unknown)), 3, &["nonesuch", "Unknown database", "create the database"]),
        (status(Some(&server_url())), 2, &["names no database", "/DATABASE"]),
    ])
    .await;
    world.execute(&format!("drop user '{user}'@'%'")).await;
}

#[tokio::test]
async fn a_malformed_database_url_is_reported_and_never_shown() {
    let world = World::new().await;
    for (url, words) in [
        ("mysql://root:s3cr3t@127.0.0.1:port/x", "mysql://USER:PASSWORD@HOST:PORT/DATABASE"),
        ("mysql://root:s3cr3t/x@127.0.0.1:3306/x", "percent-encode"),
        ("postgres://root:s3cr3t@127.0.0.1/x", "mysql://USER:PASSWORD@HOST:PORT/DATABASE"),
        ("root:s3cr3t@127.0.0.1/x", "mysql://USER:PASSWORD@HOST:PORT/DATABASE"),
        ("mysql://root:s3cr3t@127.0.0.1:3306", "names no database"),
        ("mysql://root:s3cr3t@127.0.0.1:3306/x?ssl-mode=s3cr3t", "ssl-mode is DISABLED"),
        ("", "mysql://USER:PASSWORD@HOST:PORT/DATABASE"),
    ] {
        for command in [
            with(world.command(&["status", "--log=trace"]), "DATABASE_URL", Some(url)),
            world.command(&[
                "migrate",
                "--log=sqlx=trace,projectionist=trace",
                "--database-url",
                url,
            ]),
        ] {
            let finished = finish(command).await.exits(2).prints(&[words]);
            assert!(!format!("{finished:?}").contains("s3cr3t"), "{finished:?}");
        }
    }
}

#[tokio::test]
async fn a_database_without_tables_is_reported_with_the_migrate_command() {
    let world = World::new().await;
    let folder = Folder::new().with("a.toml", &tally("a")).with("events.jsonl", &super::line("a"));
    let (events, projectors) = (folder.file("events.jsonl"), folder.path());
    world.execute("drop table projectors, event_log, events").await;
    for arguments in [
        &["status"][..],
        &["append", &events],
        &["boot", "--projectors", projectors],
        &["play", "--projectors", projectors],
        &["relay"],
        &["relay", "--once"],
        &["retire", "a", "--yes"],
        &["fill", "1", "2", "--yes"],
    ] {
        let finished = world
            .run(arguments)
            .await
            .exits(2)
            .prints(&["the tables of projectionist are missing", "projectionist migrate"]);
        assert_eq!(finished.stdout, "");
    }
}

#[tokio::test]
async fn an_unusable_queue_is_reported_with_address_and_advice() {
    let world = World::new().await;
    let folder = Folder::new().with("a.toml", &tally("a"));
    let gone = world.queue_url.replace(&world.database_name, "nonesuch");
    let endpoint =
        setting("AWS_ENDPOINT_URL").expect("AWS_ENDPOINT_URL is set: run localstack/test");
    for arguments in
        [&["relay"][..], &["relay", "--once"], &["play", "--projectors", folder.path()]]
    {
        let queue = |url: Option<&str>| with(world.command(arguments), "QUEUE_URL", url);
        let no_region = |url: &str| {
            let mut command = with(queue(Some(url)), "AWS_REGION", None);
            command.env("AWS_EC2_METADATA_DISABLED", "true").env("AWS_CONFIG_FILE", "/dev/null");
            command.env_remove("AWS_DEFAULT_REGION");
            command
        };
        let gone_in_aws = "https://sqs.us-east-1.amazonaws.com/000000000000/nonesuch";
        check(vec![
            (queue(None), 2, &["no queue is named", "--queue-url", "QUEUE_URL"]),
            (
                queue(Some("orders.fifo")),
                2,
                &["orders.fifo", "https://sqs.REGION.amazonaws.com/ACCOUNT/NAME"],
            ),
            (queue(Some(&gone)), 3, &[&gone, "does not exist", "create it", &endpoint]),
            (
                with(queue(Some(&world.queue_url)), "AWS_ENDPOINT_URL", Some("http://127.0.0.1:1")),
                3,
                &[&world.queue_url, "Connection refused", "AWS_ENDPOINT_URL", "http://127.0.0.1:1"],
            ),
            (no_region(&world.queue_url), 2, &["no AWS region is known", "AWS_REGION"]),
            // A URL of AWS has the region, so LocalStack is asked for the queue.
            (no_region(gone_in_aws), 3, &[gone_in_aws, "does not exist"]),
        ])
        .await;
    }
}

#[tokio::test]
async fn an_empty_projector_set_is_reported_with_the_searched_path() {
    let world = World::new().await;
    let folder = Folder::new().with("notes.txt", "");
    let (empty, missing, file) = (folder.path(), folder.file("missing"), folder.file("notes.txt"));
    for command in ["boot", "play"] {
        check(vec![
            (
                world.command(&[command]),
                2,
                &["there are no projectors", "--projectors", "PROJECTORS"],
            ),
            (
                world.command(&[command, "--projectors", empty]),
                2,
                &[empty, "no *.toml file", "add one"],
            ),
            (
                world.command(&[command, "--projectors", &missing]),
                2,
                &[&missing, "no such directory", "create it"],
            ),
            (
                with(world.command(&[command]), "PROJECTORS", Some(&missing)),
                2,
                &[&missing, "no such directory"],
            ),
            (world.command(&[command, "--projectors", &file]), 2, &[&file, "not a directory"]),
        ])
        .await;
    }
}

#[tokio::test]
async fn a_bad_projector_file_is_reported_with_line_and_reason_before_anything_runs() {
    let world = World::new().await;
    world.append(3).await;
    let good = tally("a");
    let without = |part: &str, replacement: &str| {
        assert!(good.contains(part), "{part}");
        good.replacen(part, replacement, 1)
    };
    for (text, line, words) in [
        (good.clone() + "sql = \n", 10, "this is not TOML"),
        (without("name = 'a'", "name = 'a"), 1, "this is not TOML"),
        (good.clone() + "retries = 3\n", 10, "unknown key `retries`"),
        (without("mode = ", "moed = "), 3, "did you mean `mode`?"),
        (without("version = 1", "version = 'one'"), 2, "`version` must be a whole number"),
        (without("from_beginning", "from_start"), 3, "unknown mode \"from_start\""),
        (without("'insert into a (position) values (:position)'", "''"), 9, "an empty handler"),
        (without(":position", ":postion"), 9, "did you mean `:position`?"),
        (without(":position", "?"), 9, "`?` cannot be bound"),
        (
            without("insert into a (position) values (:position)", "drop table a"),
            9,
            "commits on its own",
        ),
        (
            without("'create table if not exists", "'drop table b', 'create table if not exists"),
            4,
            "not for `setup`",
        ),
    ] {
        let folder = Folder::new().with("a.toml", &text).with("b.toml", &tally("b"));
        let place = format!("{}:{line}: ", folder.file("a.toml"));
        for command in ["boot", "play", "status", "retire"] {
            let mut arguments = vec![command, "--projectors", folder.path()];
            arguments.extend((command == "retire").then_some("a"));
            world.run(&arguments).await.exits(2).prints(&[&place, words]);
        }
    }
    assert!(world.ledger.entries().await.expect("the ledger is readable").is_empty());
    assert_eq!(
        world
            .number(
                "select count(*) from information_schema.tables \
                 where table_name in ('a', 'b') \
                 and table_schema = database()"
            )
            .await,
        0
    );
}

#[tokio::test]
async fn two_files_with_the_same_name_and_version_are_reported_with_both_paths() {
    let world = World::new().await;
    let folder = Folder::new()
        .with("a.toml", &tally("same"))
        .with("b.toml", &format!("# a copy\n{}", tally("same")));
    let (first, second) =
        (format!("{}:1", folder.file("a.toml")), format!("{}:2: ", folder.file("b.toml")));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(2).prints(&[
        &first,
        &second,
        "same@1",
        "another name or version",
    ]);
}

#[tokio::test]
async fn wrong_usage_exits_with_2_and_points_to_the_help() {
    let world = World::new().await;
    check(vec![
        (world.command(&[]), 2, &["Usage: projectionist"]),
        (world.command(&["nonsense"]), 2, &["unrecognized subcommand 'nonsense'", "--help"]),
        (world.command(&["status", "--jsno"]), 2, &["'--jsno'", "'--json'", "--help"]),
        (world.command(&["retire"]), 2, &["<NAME[@VERSION]>", "--help"]),
        (world.command(&["boot", "--batch", "0"]), 2, &["'0'", "--batch", "--help"]),
        (world.command(&["play", "--receive-wait", "21"]), 2, &["21 is not in 0..=20"]),
        (
            with(world.command(&["status"]), "PROJECTIONIST_BATCH", Some("many")),
            2,
            &["many", "--batch"],
        ),
        (
            world.command(&["status", "--log", "a=b=c"]),
            2,
            &["the log filter \"a=b=c\" is not valid"],
        ),
        (world.command(&["fill", "9", "3"]), 2, &["the first position, 9, lies after the last, 3"]),
    ])
    .await;
}

#[tokio::test]
async fn an_unknown_or_ambiguous_projector_is_reported_with_the_known_ones() {
    let world = World::new().await;
    let second = tally("a").replace("version = 1", "version = 2");
    let folder = Folder::new().with("1.toml", &tally("a")).with("2.toml", &second);
    world.run(&["retire", "a", "--yes"]).await.exits(2).prints(&["no projector \"a\"", "none"]);
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    for (name, words) in [
        ("b", &["no projector \"b\"", "a@1, a@2"][..]),
        ("a@3", &["no projector \"a@3\"", "did you mean a@1 or a@2?"]),
        ("a", &["name one of its versions", "a@1, a@2"]),
        ("a@one", &["\"a@one\"", "must be a number"]),
    ] {
        world.run(&["retire", name, "--yes"]).await.exits(2).prints(words);
    }
    assert_eq!(world.ledger.entries().await.expect("the ledger is readable").len(), 2);
}
