//! The example of each language, as it stands.

use std::fs;
use std::path::Path;

use projectionist::NewEvent;
use projectionist::sqlx::{self, AssertSqlSafe};

use super::{has_php, has_python, has_typescript};
use crate::support::{Folder, RunningProcess, World};

/// One order that is paid, one that is cancelled, and one that is only placed.
const ORDERS: &[(&str, &str, &str)] = &[
    ("order-1", "OrderPlaced", r#"{"customer":"Ada","amount":"19.90"}"#),
    ("order-2", "OrderPlaced", r#"{"customer":"Grace","amount":"5.00"}"#),
    ("order-1", "OrderPaid", "{\"customer\":\"Ada\",\n\"amount\":\"19.90\"}"),
    ("order-2", "OrderCancelled", "{}"),
    ("order-3", "OrderPlaced", r#"{"customer":"Łukasz 'L'","amount":"100000000.01"}"#),
];

const LATER_ORDERS: &[(&str, &str, &str)] = &[
    ("order-4", "OrderPlaced", r#"{"customer":"Ada","amount":"0.10"}"#),
    ("order-4", "OrderPaid", r#"{"customer":"Ada","amount":"0.10"}"#),
    ("order-4", "OrderShipped", "{}"),
];

async fn append(world: &World, orders: &[(&str, &str, &str)]) {
    let event = |&(stream, event_type, payload): &(&str, &str, &str)| NewEvent {
        event_id: None,
        stream_id: stream.into(),
        stream_version: None,
        event_type: event_type.into(),
        recorded_at: None,
        payload: payload.into(),
        metadata: None,
    };
    let events: Vec<NewEvent> = orders.iter().map(event).collect();
    world.store.append(&events).await.expect("the events are appended");
}

async fn rows(world: &World, sql: &str) -> Vec<String> {
    sqlx::query_scalar(AssertSqlSafe(sql))
        .fetch_all(&mut world.connection().await)
        .await
        .expect(sql)
}

/// Boots and plays the projectors of an example, and compares their results.
async fn run_example(language: &str) {
    let world = World::new().await;
    let (folder, receipts) = (Folder::new(), Folder::new());
    let example = format!("{}/examples/handlers/{language}", env!("CARGO_MANIFEST_DIR"));
    for file in ["orders.toml", "balances.toml", "receipts.toml"] {
        let text = fs::read_to_string(Path::new(&example).join(file)).expect("the example's file");
        folder.write(file, &text);
    }
    let run = async |arguments: &[&str]| {
        let mut command = world.handler_command(&folder, arguments);
        command.env("RECEIPTS_DIRECTORY", receipts.path());
        RunningProcess::spawn(command).finish().await.exits(0)
    };
    append(&world, ORDERS).await;
    let booted = run(&["boot"]).await;
    // The two read models share a process, and the reactor has its own.
    assert_eq!(booted.stderr.matches("handler started").count(), 2, "{}", booted.stderr);
    append(&world, LATER_ORDERS).await;
    run(&["play", "--until-idle"]).await;

    let orders = rows(
        &world,
        "select concat_ws(' ', order_id, customer, amount, status) from orders order by order_id",
    )
    .await;
    let expected = [
        "order-1 Ada 19.90 paid",
        "order-3 Łukasz 'L' 100000000.01 placed",
        "order-4 Ada 0.10 paid",
    ];
    assert_eq!(orders, expected);
    let balances =
        rows(&world, "select concat_ws(' ', customer, orders, paid) from balances").await;
    assert_eq!(balances, ["Ada 2 20.00"]);
    // The reactor began after the first receipt, which it must never send.
    let sent: Vec<String> = fs::read_dir(receipts.path())
        .expect("a folder")
        .map(|entry| fs::read_to_string(entry.expect("a file").path()).expect("a receipt"))
        .collect();
    assert_eq!(sent, ["Dear Ada, thank you for 0.10.\n"]);

    let status = run(&["status"]).await.stdout;
    assert!(status.contains("exactly_once") && status.contains("at_least_once"), "{status}");
    run(&["retire", "orders", "--yes", "--force"]).await;
    let tables = "select table_name from information_schema.tables \
                  where table_schema = database() and table_name = 'orders'";
    assert_eq!(rows(&world, tables).await, Vec::<String>::new());
}

#[tokio::test]
async fn the_php_example_boots_plays_and_is_retired() {
    if has_php() {
        run_example("php").await;
    }
}

#[tokio::test]
async fn the_python_example_boots_plays_and_is_retired() {
    if has_python() {
        run_example("python").await;
    }
}

#[tokio::test]
async fn the_typescript_example_boots_plays_and_is_retired() {
    if has_typescript() {
        run_example("typescript").await;
    }
}
