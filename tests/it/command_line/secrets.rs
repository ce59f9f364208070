//! A password never reaches a log, an error, a help text or a result.

use tokio::process::Command;

use super::{failing_at, line, tally};
use crate::failover::lock_out_restricted_users;
use crate::support::{
    FinishedProcess, Folder, Function, RunningProcess, Runtime, TIMEOUT, World, eventually,
    schedule, server_url,
};

/// The password of [`user`], percent-encoded for a URL.
const RIGHT: &str = "s3cr3t-Pa55%3Aword";

/// Not even a part of the password may be shown.
const PARTS: [&str; 2] = ["s3cr3t", "Pa55"];

#[track_caller]
fn assert_hidden(text: &str, of: &str) {
    for part in PARTS {
        assert!(!text.contains(part), "{of}: {text}");
    }
}

#[track_caller]
fn assert_nothing_shown(finished: &FinishedProcess, of: &str) {
    assert_hidden(&finished.stdout, of);
    assert_hidden(&finished.stderr, of);
}

/// Creates a user with a password and all privileges on the world's database.
async fn user(world: &World) -> &str {
    let user = &world.database_name[..30];
    world.execute(&format!("create user '{user}'@'%' identified by 's3cr3t-Pa55:word'")).await;
    world.execute(&format!("grant all on {}.* to '{user}'@'%'", world.database_name)).await;
    user
}

/// The URL of the world's database for this user.
fn url(world: &World, user: &str, password: &str) -> String {
    format!(
        "mysql://{user}:{password}@{}/{}",
        server_url().replace("mysql://root@", ""),
        world.database_name
    )
}

/// A command with the password in its environment and the most detailed log.
fn with_password(world: &World, arguments: &[&str], url: String, folder: &Folder) -> Command {
    let mut command = world.command(arguments);
    command.env("DATABASE_URL", url).env("PROJECTORS", folder.path());
    command.env("PROJECTIONIST_LOG", "trace,hyper=info,aws=info,h2=info,rustls=info");
    command
}

#[tokio::test]
async fn the_database_password_is_never_shown() {
    let world = World::new().await;
    // `doctor` reports an error while another test has made the server read-only.
    let mut keeper = world.connection().await;
    lock_out_restricted_users(&mut keeper).await;
    let user = user(&world).await;
    let url = |password: &str| url(&world, user, password);
    let folder = Folder::new().with("a.toml", &tally("a")).with("b.toml", &failing_at("b", 5));
    let events = Folder::new().with("events.jsonl", &[line("a"), line("b"), line("c")].join("\n"));
    let file = events.file("events.jsonl");
    let ours = |arguments: &[&str], password: &str| {
        with_password(&world, arguments, url(password), &folder)
    };
    let (right, wrong) = (RIGHT, "s3cr3t-Pa55-wrong");
    for (arguments, password, code) in [
        (&["migrate"][..], right, 0),
        (&["append", &file], right, 0),
        (&["boot"], right, 0),
        (&["append", &file], right, 0),
        (&["relay", "--once"], right, 0),
        (&["play", "--until-idle"], right, 1),
        (&["status"], right, 0),
        (&["status", "--json"], right, 0),
        (&["audit"], right, 0),
        (&["audit", "--json"], right, 0),
        (&["fill", "1", "2", "--yes"], right, 2),
        (&["fill", "1", "1000", "--yes"], right, 2),
        (&["doctor"], right, 0),
        (&["doctor", "--json"], right, 0),
        (&["retire", "nobody", "--yes"], right, 2),
        (&["--help"], right, 0),
        (&["boot", "--help"], right, 0),
        (&["status", "-h"], right, 0),
        (&["nonsense"], right, 2),
        (&["lambda"], right, 2),
        (&["lambda", "--help"], right, 0),
        (&["health", "--heartbeat=/no/such/file"], right, 1),
        (&["migrate"], wrong, 3),
        (&["append", &file], wrong, 3),
        (&["boot"], wrong, 3),
        (&["relay", "--once"], wrong, 3),
        (&["play", "--until-idle"], wrong, 3),
        (&["status"], wrong, 3),
        (&["retire", "a", "--yes"], wrong, 3),
        (&["audit"], wrong, 3),
        (&["fill", "1", "2", "--yes"], wrong, 3),
        (&["doctor"], wrong, 3),
        (&["doctor", "--json"], wrong, 3),
        (&["status", "--batch=0"], right, 2),
        (&["status", "--database-url", &url(right), "--no-such-option"], right, 2),
    ] {
        let finished = RunningProcess::spawn(ours(arguments, password)).finish().await.exits(code);
        assert_nothing_shown(&finished, &arguments.join(" "));
    }
    let help = RunningProcess::spawn(ours(&["--help"], right)).finish().await.exits(0).stdout;
    assert!(help.contains("[env: DATABASE_URL]"), "the help must name the variable");
    world.execute(&format!("drop user '{user}'@'%'")).await;
}

#[tokio::test]
async fn responses_to_lambda_never_show_a_password() {
    let world = World::new().await;
    // A scheduled invocation fails while another test has made the server read-only.
    let mut keeper = world.connection().await;
    lock_out_restricted_users(&mut keeper).await;
    let user = user(&world).await;
    let folder = Folder::new().with("a.toml", &tally("a"));
    let ours = |password| with_password(&world, &["lambda"], url(&world, user, password), &folder);
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    world.append(3).await;
    let mut function = Function::start(ours(RIGHT)).await;
    let answer = function.invoke(&schedule(), TIMEOUT).await.expect("the invocation succeeds");
    assert_hidden(&answer.to_string(), "the answer");
    assert_eq!(
        world.number("select published from event_log").await,
        3,
        "the function must have published"
    );
    let failed =
        function.invoke(&"no event".into(), TIMEOUT).await.expect_err("the event is invalid");
    assert_hidden(&failed.to_string(), "the error");
    assert_nothing_shown(&function.process.terminate().await.exits(0), "lambda");

    let mut runtime = Runtime::new().await;
    let mut refused = ours("s3cr3t-Pa55-wrong");
    runtime.configure(&mut refused);
    let refused = RunningProcess::spawn(refused);
    assert_hidden(&runtime.init_error().await.to_string(), "the error of its initialization");
    assert_nothing_shown(&refused.finish().await.exits(3), "lambda with a wrong password");
    world.execute(&format!("drop user '{user}'@'%'")).await;
}

/// Every user of the host can read command lines, so a password belongs in the environment. It must
/// not be copied from there into an argument of this process or of a child process.
#[tokio::test]
async fn the_command_line_in_the_process_list_shows_no_password() {
    let world = World::new().await;
    let user = user(&world).await;
    let folder = Folder::new().with("a.toml", &tally("a"));
    world.run(&["boot", "--projectors", folder.path()]).await.exits(0);
    let play =
        RunningProcess::spawn(with_password(&world, &["play"], url(&world, user, RIGHT), &folder));
    world.append(3).await;
    eventually("the worker plays", async || world.position("a").await == 3).await;
    let of_process = |file: &str| {
        let bytes =
            std::fs::read(format!("/proc/{}/{file}", play.id())).expect("the process is running");
        String::from_utf8_lossy(&bytes).replace('\0', " ")
    };
    assert!(of_process("environ").contains(RIGHT), "the environment must contain the password");
    let line = of_process("cmdline");
    assert!(line.ends_with("projectionist play "), "{line}");
    assert_hidden(&line, "the command line");
    let children = of_process(&format!("task/{}/children", play.id()));
    assert_eq!(children, "", "the worker must start no child process");
    assert_nothing_shown(&play.terminate().await.exits(0), "play");
    world.execute(&format!("drop user '{user}'@'%'")).await;
}
