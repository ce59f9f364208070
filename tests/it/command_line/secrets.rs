//! A password never reaches a log, an error, a help text or a result.

use tokio::process::Command;

use super::{failing_at, line, tally};
use crate::support::{Folder, Running, World, server_url};

#[tokio::test]
async fn the_databases_password_is_shown_nowhere() {
    let world = World::new().await;
    let (user, password) = (&world.database_name[..30], "s3cr3t-Pa55:word");
    world.execute(&format!("create user '{user}'@'%' identified by '{password}'")).await;
    world.execute(&format!("grant all on {}.* to '{user}'@'%'", world.database_name)).await;
    let server = server_url().replace("mysql://root@", "");
    let url = |encoded: &str| format!("mysql://{user}:{encoded}@{server}/{}", world.database_name);
    let folder = Folder::new().with("a.toml", &tally("a")).with("b.toml", &failing_at("b", 5));
    let events = Folder::new().with("events.jsonl", &[line("a"), line("b"), line("c")].join("\n"));
    let file = events.file("events.jsonl");
    let ours = |arguments: &[&str], encoded: &str| {
        let mut command: Command = world.command(arguments);
        command.env("DATABASE_URL", url(encoded)).env("PROJECTORS", folder.path());
        command.env("PROJECTIONIST_LOG", "trace,hyper=info,aws=info,h2=info,rustls=info");
        command
    };
    let right = "s3cr3t-Pa55%3Aword";
    for (arguments, encoded, code) in [
        (&["migrate"][..], right, 0),
        (&["append", &file], right, 0),
        (&["boot"], right, 0),
        (&["append", &file], right, 0),
        (&["relay", "--once"], right, 0),
        (&["play", "--until-idle"], right, 1),
        (&["status"], right, 0),
        (&["status", "--json"], right, 0),
        (&["retire", "nobody", "--yes"], right, 2),
        (&["--help"], right, 0),
        (&["boot", "--help"], right, 0),
        (&["status", "-h"], right, 0),
        (&["nonsense"], right, 2),
        (&["status"], "s3cr3t-Pa55-wrong", 3),
        (&["status", "--batch=0"], right, 2),
        (&["status", "--database-url", &url(right), "--no-such-option"], right, 2),
    ] {
        let finished = Running::spawn(ours(arguments, encoded)).finish().await.exits(code);
        for part in ["s3cr3t", "Pa55"] {
            assert!(!finished.stdout.contains(part) && !finished.stderr.contains(part), "{arguments:?}: {finished:?}");
        }
    }
    let help = Running::spawn(ours(&["--help"], right)).finish().await.exits(0).stdout;
    assert!(help.contains("[env: DATABASE_URL]"), "its name is there, its value is not");
    world.execute(&format!("drop user '{user}'@'%'")).await;
}
