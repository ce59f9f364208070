//! Which errors of the server break a projector: every error in the table of
//! `src/database/server_error.rs`, raised on the real server by its number.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use projectionist::sqlx::{self, AssertSqlSafe, MySqlConnection};
use projectionist::{Database, Event, EventTypes, Projector, async_trait, boot};

use crate::support::{ScriptedProjector, TIMEOUT, Tally, World, eventually, registry_of, run};

const TABLE: &str = include_str!("../../src/database/server_error.rs");

/// An error of the server: its number, and a message like the server's own.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ServerError {
    number: u16,
    message: String,
}

/// The errors that pass, from the rows of the table.
fn passing_errors() -> Vec<ServerError> {
    let rows = TABLE.lines().filter_map(|line| {
        let (row, rest) = line.strip_prefix("    row")?.split_once('(')?;
        let (number, rest) = rest.split_once(',')?;
        let message = match row {
            "_with_code" => "Got error 28 - 'No space left on device' from storage engine",
            "_with" => rest.split('"').nth(1)?,
            _ => "as the test asks",
        };
        Some(ServerError { number: number.parse().ok()?, message: message.into() })
    });
    rows.collect()
}

/// The errors that look as if they passed, from the table in the documentation, and the most
/// frequent ones of statements.
fn permanent_errors() -> Vec<ServerError> {
    let listed = TABLE.lines().filter_map(|line| line.strip_prefix("//! | ")?.split(" | ").next());
    let listed = listed.flat_map(|numbers| numbers.split(", ")).filter_map(|number| {
        let number: u16 = number.parse().ok()?;
        Some(ServerError { number, message: "as the test asks".into() })
    });
    let frequent = [
        (1030, "Got error 139 \"Too big row\" from storage engine"),
        (1048, "Column 'a' cannot be null"),
        (1054, "Unknown column 'a' in 'field list'"),
        (1062, "Duplicate entry '28' for key 'PRIMARY'"),
        (1064, "You have an error in your SQL syntax near '1205'"),
        (1146, "Table 'a.b' doesn't exist"),
        (1290, "The server is running with the --secure-file-priv option"),
        (1406, "Data too long for column 'a'"),
        (1452, "Cannot add or update a child row: a foreign key constraint fails"),
        (3819, "Check constraint 'a' is violated"),
        (4025, "CONSTRAINT `a` failed for `b`.`c`"),
    ]
    .map(|(number, message)| ServerError { number, message: message.into() });
    listed.chain(frequent).collect()
}

/// Raises an error in a session.
async fn raise(error: &ServerError, db: &mut MySqlConnection) -> anyhow::Result<()> {
    let message = error.message.replace('\'', "''");
    let signal = format!(
        "signal sqlstate 'HY000' set mysql_errno = {}, message_text = '{message}'",
        error.number
    );
    sqlx::raw_sql(AssertSqlSafe(signal)).execute(db).await?;
    Ok(())
}

#[tokio::test]
async fn each_passing_error_in_a_handler_is_retried_and_breaks_no_projector() {
    let world = World::new().await;
    // With side effects, each event is a transaction of its own: each error has its own attempts.
    let (errors, tally) = (passing_errors(), Tally::new("tally").with_side_effects());
    assert!(errors.len() > 100, "the rows of the table are read: {}", errors.len());
    let raised: Arc<Mutex<HashSet<ServerError>>> = Arc::default();
    let (count, raised_errors, raising) = (errors.len(), Arc::clone(&raised), errors.clone());
    let projector = ScriptedProjector::new(&tally, move |event: &Event, db| {
        let error = raising[event.position().get() as usize - 1].clone();
        let is_first = raised_errors.lock().expect("no panic").insert(error.clone());
        Box::pin(async move { if is_first { raise(&error, db).await } else { Ok(()) } })
    });
    let registry = registry_of([projector]);
    world.boot(&registry).await;
    world.append(count).await;

    let played = world.play_until_idle(&registry).await;

    assert_eq!(played.broken, 0, "{:?}", world.entry("tally").await);
    world.assert_complete(&tally).await;
    let raised = raised.lock().expect("no panic");
    let missing: Vec<_> = errors.iter().filter(|error| !raised.contains(error)).collect();
    assert!(missing.is_empty(), "never raised: {missing:?}");
}

/// Fails at its first event.
struct Failing {
    name: String,
    error: ServerError,
}

#[async_trait]
impl Projector for Failing {
    fn name(&self) -> &str {
        &self.name
    }

    fn event_types(&self) -> EventTypes {
        EventTypes::All
    }

    async fn handle(&self, _: &Event, db: &mut MySqlConnection) -> anyhow::Result<()> {
        raise(&self.error, db).await
    }
}

#[tokio::test]
async fn each_permanent_error_in_a_handler_breaks_its_projector() {
    let world = World::new().await;
    let errors = permanent_errors();
    assert!(errors.len() > 40, "the list of permanent errors is read: {}", errors.len());
    let names: Vec<String> =
        (0..errors.len()).map(|index| format!("p{index}_{}", errors[index].number)).collect();
    let failing = errors.iter().zip(&names);
    let registry = registry_of(
        failing.map(|(error, name)| Failing { name: name.clone(), error: error.clone() }),
    );
    assert!(world.boot(&registry).await.is_released());
    world.append(1).await;

    world.play_until_idle(&registry).await;

    for (error, name) in errors.iter().zip(&names) {
        world.assert_broken(name, 1, &error.message).await;
    }
}

/// A privilege that a projector's handler needs.
struct Privilege {
    grant: &'static str,
    handler: &'static str,
}

const PRIVILEGES: &[Privilege] = &[
    // On a table: error 1142.
    Privilege {
        grant: "grant insert on {db}.model to {user}",
        handler: "insert into model (n) values (1)",
    },
    // On a column: error 1143.
    Privilege {
        grant: "grant insert (n) on {db}.model to {user}",
        handler: "insert into model (n) values (1)",
    },
    // On a routine: error 1370.
    Privilege {
        grant: "grant execute on procedure {db}.add_row to {user}",
        handler: "call add_row()",
    },
    // On the whole database: a session keeps the privileges that it had when it chose the database.
    Privilege { grant: "grant delete on {db}.* to {user}", handler: "delete from model" },
];

#[tokio::test]
async fn a_missing_privilege_on_a_read_model_is_retried_until_it_is_granted() {
    for privilege in PRIVILEGES {
        let mut world = World::new().await;
        world.execute("create table model (n int, other int)").await;
        world.execute("create procedure add_row() insert into model (n) values (1)").await;
        let name = format!("u{:x}", fastrand::u64(..));
        let user = format!("'{name}'@'%'");
        let sql = |sql: &str| sql.replace("{db}", &world.database_name).replace("{user}", &user);
        world.execute(&format!("create user {user} identified by 'only-for-this'")).await;
        for table in ["events", "event_log", "projectors", "log_acceptances", "tally"] {
            world.execute(&sql(&format!("grant all on {{db}}.{table} to {{user}}"))).await;
        }
        let grant = sql(privilege.grant);
        let revoke = grant.replacen("grant", "revoke", 1).replace(" to ", " from ");
        let (tally, attempts) = (Tally::new("tally"), Arc::new(AtomicUsize::new(0)));
        let (counted, handler) = (Arc::clone(&attempts), privilege.handler);
        let projector = ScriptedProjector::new(&tally, move |_, db| {
            counted.fetch_add(1, Ordering::SeqCst);
            Box::pin(run(db, handler))
        });
        let registry = registry_of([projector]);
        world.boot(&registry).await;
        let url = world.database_url.replace("://root@", &format!("://{name}:only-for-this@"));
        world.database = Database::connect(&url, 8, TIMEOUT).await.expect("the user may log in");

        // The second time, the privilege is revoked from a worker that had it.
        for last in 1..=2 {
            attempts.store(0, Ordering::SeqCst);
            let playing = world.start_play(&registry);
            world.append(1).await;
            eventually("the handler is tried again and again", async || {
                attempts.load(Ordering::SeqCst) > 3
            })
            .await;
            assert_eq!(world.status("tally").await, "live", "{handler}");

            world.execute(&grant).await;

            eventually("the projector continues", async || world.position("tally").await == last)
                .await;
            assert_eq!(playing.stop().await.broken, 0);
            world.execute(&revoke).await;
            if grant.contains(".*") {
                // A session with the privilege keeps it.
                break;
            }
        }
        world.assert_complete(&tally).await;
        world.execute(&format!("drop user {user}")).await;
    }
}

#[tokio::test]
async fn a_missing_privilege_in_boot_is_named_and_breaks_no_projector() {
    let world = World::new().await;
    world.append(3).await;
    world.execute("create table model (n int)").await;
    let name = format!("u{:x}", fastrand::u64(..));
    world.execute(&format!("create user '{name}'@'%' identified by 'only-for-this'")).await;
    for table in ["events", "event_log", "projectors", "log_acceptances", "tally"] {
        let table = format!("{}.{table}", world.database_name);
        world.execute(&format!("grant all on {table} to '{name}'@'%'")).await;
    }
    let tally = Tally::new("tally");
    let projector =
        ScriptedProjector::new(&tally, |_, db| Box::pin(run(db, "insert into model values (1)")));
    let registry = registry_of([projector]);
    let url = world.database_url.replace("://root@", &format!("://{name}:only-for-this@"));
    let restricted = Database::connect(&url, 8, TIMEOUT).await.expect("the user may log in");

    let limits = World::play_settings().limits.with_retry_timeout(Some(TIMEOUT));
    let refused = boot(&restricted, &registry, limits, |_| {}).await.expect_err("boot fails");

    assert!(refused.to_string().contains("INSERT command denied"), "{refused}");
    assert_eq!(world.status("tally").await, "booting");
    world.execute(&format!("drop user '{name}'@'%'")).await;
    world.append(1).await;
    assert!(world.boot(&registry).await.is_released());
    world.assert_complete(&tally).await;
}
