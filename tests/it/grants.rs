//! Least privilege, and TLS: each command works for a user that has the grants of
//! `docs/command-line.md` and no others.

use projectionist::sqlx;

use crate::failover::lock_out_restricted_users;
use crate::support::{TIMEOUT, World, execute, is_mariadb, schedule};

/// The grants that the page lists for a command: privileges, and one of our tables. The projectors'
/// own statements need more; here that is one table. (A test beside `doctor`'s list compares that
/// list with the page.)
pub fn grants_of(command: &str) -> Vec<(Vec<&'static str>, &'static str)> {
    let row = format!("| `{command}` | `");
    let row = include_str!("../../docs/command-line.md")
        .lines()
        .find_map(|line| line.strip_prefix(&row))
        .expect("the page lists it");
    let grants = row.trim_end_matches(" |").trim_end_matches('`').split("` · `");
    grants
        .map(|grant| grant.split_once(" on ").expect("a table"))
        .map(|(all, table)| (all.split(", ").collect(), table))
        .collect()
}

const PROJECTOR: &str = r#"
name = "counter"
version = 1
mode = "from_beginning"
setup = ["create table if not exists counter (n bigint)"]
teardown = ["drop table if exists counter"]

[[on]]
events = ["*"]
sql = "insert into counter (n) values (:position)"
"#;

/// The privileges that the projector's own statements need.
const OWN: &str = "create, insert, drop on {db}.counter";

/// A user that has the page's grants for a command, and nothing else.
struct Granted {
    name: String,
    url: String,
}

impl Granted {
    async fn new(world: &World, command: &str) -> Self {
        let grants = grants_of(command).into_iter();
        let grants = grants.map(|(all, table)| format!("{} on {{db}}.{table}", all.join(", ")));
        let name = format!("u{:x}", fastrand::u64(..));
        let mut admin = world.connection().await;
        execute(&mut admin, &format!("create user '{name}'@'%' identified by 'only-for-this'"))
            .await;
        let own = ["boot", "play", "lambda", "retire"].contains(&command).then(|| OWN.to_owned());
        for grant in grants.chain(own) {
            execute(
                &mut admin,
                &format!("grant {} to '{name}'@'%'", grant.replace("{db}", &world.database_name)),
            )
            .await;
        }
        let url = world.database_url.replace("://root@", &format!("://{name}:only-for-this@"));
        assert_ne!(url, world.database_url);
        Granted { name, url }
    }

    async fn drop(self, world: &World) {
        world.execute(&format!("drop user '{}'@'%'", self.name)).await;
    }
}

/// Runs a command as a user that has the page's grants for it, and nothing else.
async fn run_as_granted(world: &World, command: &str, arguments: &[&str], input: &[u8]) {
    let user = Granted::new(world, command).await;
    let ran = world.run_with(&[arguments, &["--database-url", &user.url]].concat(), input).await;
    user.drop(world).await;
    ran.exits(0);
}

#[tokio::test]
async fn each_command_works_with_only_the_grants_in_the_readme() {
    let world = World::new().await;
    let mut admin = world.connection().await;
    lock_out_restricted_users(&mut admin).await;
    for table in
        ["events", "event_log", "projectors", "log_acceptances", "projectionist_migrations"]
    {
        world.execute(&format!("drop table {table}")).await;
    }
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("counter.toml"), PROJECTOR).expect("a file");
    let folder = folder.path().to_str().expect("UTF-8");
    let line = b"{\"stream_id\":\"a\",\"event_type\":\"Opened\",\"payload\":1}\n";

    run_as_granted(&world, "migrate", &["migrate"], b"").await;
    run_as_granted(&world, "append", &["append"], line).await;
    // A rollback leaves a gap, and the mark passes it with a filler.
    world.execute("begin; insert into events (stream_id, stream_version, event_type, payload) values ('b', 1, 'Opened', '1'); rollback").await;
    run_as_granted(&world, "append", &["append"], line).await;
    run_as_granted(&world, "boot", &["boot", "--projectors", folder], b"").await;
    assert_eq!(
        (world.position("counter").await, world.number("select count(*) from counter").await),
        (3, 2)
    );
    run_as_granted(&world, "append", &["append"], line).await;
    run_as_granted(&world, "relay", &["relay", "--once"], b"").await;
    run_as_granted(&world, "append", &["append"], line).await;
    run_as_granted(&world, "play", &["play", "--until-idle", "--projectors", folder], b"").await;
    assert_eq!(world.number("select count(*) from counter").await, 4);
    let user = Granted::new(&world, "lambda").await;
    let mut function = world.function(&["--projectors", folder, "--database-url", &user.url]).await;
    run_as_granted(&world, "append", &["append"], line).await;
    function.invoke(&schedule(), TIMEOUT).await.expect("an answer");
    assert_eq!(function.drain(&world).await, 1);
    function.process.terminate().await.exits(0);
    user.drop(&world).await;
    assert_eq!(world.number("select count(*) from counter").await, 5);
    run_as_granted(&world, "status", &["status"], b"").await;
    run_as_granted(&world, "audit", &["audit"], b"").await;
    world.execute("delete from events where position = 3").await;
    let accept = ["audit", "--accept", "3", "3", "--reason", "as the test asks", "--yes"];
    run_as_granted(&world, "audit --accept", &accept, b"").await;
    world.execute("alter table events auto_increment = 10").await;
    run_as_granted(&world, "append", &["append"], line).await;
    run_as_granted(&world, "fill", &["fill", "7", "9", "--yes"], b"").await;
    assert_eq!(world.number("select count(*) from events").await, 10);
    run_as_granted(
        &world,
        "retire",
        &["retire", "counter", "--force", "--yes", "--projectors", folder],
        b"",
    )
    .await;
    assert_eq!(world.status("counter").await, "new");
}

#[tokio::test]
async fn a_command_without_a_grant_names_it_and_the_documentation() {
    let world = World::new().await;
    let user = format!("u{:x}", fastrand::u64(..));
    let mut admin = world.connection().await;
    execute(&mut admin, &format!("create user '{user}'@'%' identified by 'x'")).await;
    execute(&mut admin, &format!("grant select on {}.events to '{user}'@'%'", world.database_name))
        .await;
    let url = world.database_url.replace("://root@", &format!("://{user}:x@"));
    let ran = world.run(&["relay", "--once", "--database-url", &url]).await;
    execute(&mut admin, &format!("drop user '{user}'@'%'")).await;
    let ran = ran.exits(2);
    assert!(
        ran.stderr.contains("event_log") && ran.stderr.contains("docs/command-line.md"),
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn tls_is_never_silently_disabled_and_certificates_are_checked_on_request() {
    let world = World::new().await;
    let with = |options: &str| format!("{}?{options}", world.database_url);
    if is_mariadb().await {
        // This server has no certificate.
        let ran =
            world.run(&["status", "--database-url", &with("ssl-mode=REQUIRED")]).await.exits(3);
        assert!(ran.stderr.to_lowercase().contains("tls"), "{}", ran.stderr);
        return;
    }
    let (datadir, ca): (String, String) = sqlx::query_as("select @@datadir, @@ssl_ca")
        .fetch_one(&mut world.connection().await)
        .await
        .expect("the server's certificate authority");
    let ca = std::path::Path::new(&datadir).join(ca);
    let ca = ca.to_str().expect("UTF-8");
    world.run(&["status", "--database-url", &with("ssl-mode=REQUIRED")]).await.exits(0);
    // The server's certificate is self-made, and its name is not this host's. The check of the
    // certificate passes, and the check of the name does not.
    world
        .run(&["status", "--database-url", &with(&format!("ssl-mode=VERIFY_CA&ssl-ca={ca}"))])
        .await
        .exits(0);
    world
        .run(&["status", "--database-url", &with(&format!("ssl-mode=VERIFY_IDENTITY&ssl-ca={ca}"))])
        .await
        .exits(3);
    // No authority that this host trusts has signed the certificate.
    world.run(&["status", "--database-url", &with("ssl-mode=VERIFY_CA")]).await.exits(3);
}
