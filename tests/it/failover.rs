//! A server that has become read-only, like the former primary after a failover.

use std::time::Duration;

use projectionist::sqlx::{self, MySqlConnection};

use crate::support::{self, Folder, World, event, eventually, execute};

/// Takes a server-wide lock. `read_only` is a global setting that affects only users without
/// special privileges. The tests that use such users, here and in `grants.rs`, hold this lock.
pub async fn lock_out_restricted_users(admin: &mut MySqlConnection) {
    let locked: i64 =
        sqlx::query_scalar("select cast(get_lock('restricted_users', 120) as signed)")
            .fetch_one(admin)
            .await
            .expect("the lock is requested");
    assert_eq!(locked, 1, "the lock is not free within two minutes");
}

const PROJECTOR: &str = r#"
name = "counter"
version = 1
mode = "from_beginning"
setup = ["create table if not exists counter (n bigint)"]

[[on]]
events = ["*"]
sql = "insert into counter (n) values (:position)"
"#;

/// [`PROJECTOR`] with a delay of 20 ms for each event, so that a test can act in the middle.
fn slow_projector() -> String {
    PROJECTOR.replace(":position)", ":position + sleep(0.02))")
}

/// The ids of a user's sessions.
async fn sessions(admin: &mut MySqlConnection, user: &str) -> Vec<u64> {
    let all = support::sessions(admin).await.into_iter();
    all.filter(|session| session.user == user).map(|session| session.id).collect()
}

/// Creates a user without special privileges. Returns its name and its URL. No other test uses such
/// a user until the connection of `admin` ends.
async fn restricted_user(world: &World, admin: &mut MySqlConnection) -> (String, String) {
    lock_out_restricted_users(admin).await;
    let user = format!("u{:x}", fastrand::u64(..));
    execute(admin, &format!("create user '{user}'@'%' identified by 'x'")).await;
    execute(
        admin,
        &format!(
            "grant select, insert, update, create on {}.* to '{user}'@'%'",
            world.database_name
        ),
    )
    .await;
    let url = world.database_url.replace("://root@", &format!("://{user}:x@"));
    (user, url)
}

#[tokio::test]
async fn a_read_only_server_breaks_no_projector_and_its_connections_are_closed() {
    let world = World::new().await;
    let mut admin = world.connection().await;
    let (user, url) = restricted_user(&world, &mut admin).await;
    let folder = tempfile::tempdir().expect("the folder is created");
    std::fs::write(folder.path().join("counter.toml"), PROJECTOR).expect("the file is written");
    let folder = folder.path().to_str().expect("the path is UTF-8");
    world.run(&["boot", "--projectors", folder]).await.exits(0);

    let playing = world.start(&["play", "--projectors", folder, "--database-url", &url]);
    world.append(10).await;
    eventually("the worker plays", || async { world.position("counter").await == 10 }).await;
    let before = sessions(&mut admin, &user).await;
    assert!(!before.is_empty());

    // The writers continue, as they would on the new primary: here, they have special privileges.
    execute(&mut admin, "set global read_only = 1").await;
    world
        .store
        .append(&(0..10).map(event).collect::<Vec<_>>())
        .await
        .expect("the events are appended");
    tokio::time::timeout(Duration::from_secs(30), async {
        while sessions(&mut admin, &user).await.iter().any(|session| before.contains(session)) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the old connections are closed");
    assert_eq!(
        (world.status("counter").await, world.position("counter").await),
        ("live".into(), 10)
    );
    execute(&mut admin, "set global read_only = 0").await;

    eventually("the worker continues", || async { world.position("counter").await == 20 }).await;
    playing.terminate().await.exits(0);
    assert_eq!(world.number("select count(*) from counter").await, 20);
    assert_eq!(world.status("counter").await, "live");
    execute(&mut admin, &format!("drop user '{user}'@'%'")).await;
}

#[tokio::test]
async fn a_server_that_becomes_read_only_during_a_boot_breaks_no_projector() {
    let world = World::new().await;
    let mut admin = world.connection().await;
    let (user, url) = restricted_user(&world, &mut admin).await;
    let folder = Folder::new().with("counter.toml", &slow_projector());
    world.append(200).await;
    let booting =
        world.start(&["boot", "--batch=10", "--projectors", folder.path(), "--database-url", &url]);
    eventually("boot has applied events", || async {
        world.entry("counter").await.is_some_and(|c| c.position.get() > 20)
    })
    .await;

    execute(&mut admin, "set global read_only = 1").await;
    booting.wait_for_log("trying again").await;
    let position = world.position("counter").await;
    assert!(position < 200, "the boot must be unfinished");
    assert_eq!(world.status("counter").await, "booting");
    assert_eq!(
        world.number("select count(*) from counter").await,
        position,
        "the rejected batch is rolled back"
    );
    execute(&mut admin, "set global read_only = 0").await;

    booting.finish().await.exits(0);
    assert_eq!(
        (world.status("counter").await, world.position("counter").await),
        ("live".into(), 200)
    );
    assert_eq!(world.number("select count(*) from counter").await, 200);
    execute(&mut admin, &format!("drop user '{user}'@'%'")).await;
}
