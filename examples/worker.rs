//! A team's own worker: projectors in Rust, with all commands of the shipped binary.
//!
//! Run it with `cargo run --example worker -- boot`, then `… -- play`. Copy it as a starting
//! point.

use std::process::ExitCode;

use projectionist::{Event, EventTypes, Mode, Projector, Registry, async_trait, sqlx};
use serde::Deserialize;

/// A read model: how many cases each department has received.
struct CasesPerDepartment;

#[derive(Deserialize)]
struct ReceiptPayload {
    department: String,
}

#[async_trait]
impl Projector for CasesPerDepartment {
    fn name(&self) -> &str {
        "cases_per_department"
    }

    fn event_types(&self) -> EventTypes {
        EventTypes::only(["Confirmation of receipt"])
    }

    async fn setup(&self, db: &mut sqlx::MySqlConnection) -> anyhow::Result<()> {
        sqlx::query(
            "create table if not exists cases_per_department \
             (department varchar(100) primary key, cases bigint not null)",
        )
        .execute(db)
        .await?;
        Ok(())
    }

    async fn teardown(&self, db: &mut sqlx::MySqlConnection) -> anyhow::Result<()> {
        sqlx::query("drop table if exists cases_per_department").execute(db).await?;
        Ok(())
    }

    async fn handle(&self, event: &Event, db: &mut sqlx::MySqlConnection) -> anyhow::Result<()> {
        let received: ReceiptPayload = event.payload()?;
        sqlx::query(
            "insert into cases_per_department (department, cases) values (?, 1) \
             on duplicate key update cases = cases + 1",
        )
        .bind(received.department)
        .execute(db)
        .await?;
        Ok(())
    }
}

/// A reactor. Its effect is outside the database, so it happens at least once. A receiver
/// recognises a repetition by the event id.
struct AnnounceReceipt;

#[async_trait]
impl Projector for AnnounceReceipt {
    fn name(&self) -> &str {
        "announce_receipt"
    }

    fn mode(&self) -> Mode {
        Mode::FromNow
    }

    fn event_types(&self) -> EventTypes {
        EventTypes::only(["Confirmation of receipt"])
    }

    fn has_side_effects(&self) -> bool {
        true
    }

    async fn handle(&self, event: &Event, _: &mut sqlx::MySqlConnection) -> anyhow::Result<()> {
        println!("idempotency-key {}: {} was received", event.event_id(), event.stream_id());
        Ok(())
    }
}

fn main() -> ExitCode {
    match Registry::new()
        .with(CasesPerDepartment)
        .and_then(|registry| registry.with(AnnounceReceipt))
    {
        Ok(registry) => projectionist::run(registry),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}
