//! Projectionist runs the projectors of an event-sourced system. It fills a new projector from the
//! events in MySQL or MariaDB while the deploy waits. From then on, a worker keeps it up to date,
//! with all the others, from one SQS queue.
//!
//! The crate is a library and a binary. The binary runs projectors that are TOML files. With the
//! library, a team adds projectors in Rust and keeps every command of the binary:
//!
//! ```no_run
//! use projectionist::{Event, EventTypes, Projector, Registry, async_trait, sqlx};
//!
//! struct CasesPerDepartment;
//!
//! #[derive(serde::Deserialize)]
//! struct Confirmation {
//!     department: String,
//! }
//!
//! #[async_trait]
//! impl Projector for CasesPerDepartment {
//!     fn name(&self) -> &str {
//!         "cases_per_department"
//!     }
//!
//!     fn event_types(&self) -> EventTypes {
//!         EventTypes::only(["Confirmation of receipt"])
//!     }
//!
//!     async fn setup(&self, db: &mut sqlx::MySqlConnection) -> anyhow::Result<()> {
//!         let table = "create table if not exists cases_per_department \
//!                      (department varchar(100) primary key, cases bigint not null)";
//!         sqlx::query(table).execute(db).await?;
//!         Ok(())
//!     }
//!
//!     /// The connection belongs to the transaction that also moves the projector's position.
//!     async fn handle(&self, event: &Event, db: &mut sqlx::MySqlConnection) -> anyhow::Result<()> {
//!         let confirmation: Confirmation = event.payload()?;
//!         let count = "insert into cases_per_department (department, cases) values (?, 1) \
//!                      on duplicate key update cases = cases + 1";
//!         sqlx::query(count).bind(confirmation.department).execute(db).await?;
//!         Ok(())
//!     }
//! }
//!
//! fn main() -> std::process::ExitCode {
//!     let registry = Registry::new().with(CasesPerDepartment).expect("a name that is not taken");
//!     projectionist::run(registry)
//! }
//! ```
//!
//! # Where to start
//!
//! - Implement [`Projector`], add it to a [`Registry`], and hand the registry to [`run`]: that is a
//!   whole worker. [`load`] adds the projectors of a folder of files.
//! - Append with [`EventStore::append`], or with a plain `insert` from any language: the table
//!   `events` is the interface.
//! - Send many rows in one statement with [`MultiRowInsert`].
//! - To embed the engine in a program of your own, connect a [`Database`], and call [`boot()`]
//!   during the deploy and [`play()`] in the worker. [`Ledger`] reads the position and [`Status`]
//!   of each projector. [`Queue`] is the seam to the queue, and [`SqsQueue`] its implementation for
//!   SQS.
//!
//! # The guarantee
//!
//! The projector's position row is the only authority. A queue message is the event's fast path,
//! never the only path: the queue may lose, repeat or reorder messages, and each read model still
//! is the fold of the log up to its projector's position, with each event applied once. An effect
//! outside the database happens at least once.
//!
//! The folder `docs/` of the repository has the concepts, the protocol, the guarantees with their
//! tests, and the pages about deploying and operating.
#![warn(missing_docs)]
// Layers, from the top. Imports point downward only; `tests/it/layers.rs` checks it.
mod command;
mod telemetry;

mod lambda;

mod engine;

mod declared;

mod handlers;

mod aws;
mod database;
mod ledger;
mod queue;
mod store;

mod model;

// Built for tests only: a model of the whole protocol, and helpers for unit tests.
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod testing;

pub use anyhow;
pub use async_trait::async_trait;
pub use sqlx;
pub use time;

pub use aws::AwsError;
pub use command::run;
pub use database::multi_row::MultiRowInsert;
pub use database::{Database, DatabaseError};
pub use declared::{LoadError, load};
pub use engine::boot::{BootProgress, BootReport, BootSettings, BootWait, ProjectorOutcome, boot};
pub use engine::error::Error;
pub use engine::play::{BackgroundLimits, PlayReport, PlaySettings, play};
pub use engine::relay::RelaySettings;
pub use engine::retry::Limits;
pub use ledger::{Entry, Ledger};
pub use model::event::{Event, FILLER, NewEvent, Position, RecordedEvent};
pub use model::lifecycle::{FailedEvent, Failure, Status};
pub use model::projector::{EventTypes, Mode, Projector, ProjectorId, SessionUse};
pub use model::registry::{Registry, RegistryError};
pub use model::retry_later::RetryLater;
pub use model::retrying::Retrying;
pub use queue::{Queue, QueueError, Receipt, ReceivedMessage, SqsQueue};
pub use store::{AppendError, AppendOutcome, EventStore};

/// Compiles the Rust in the pages. `tests/it/documentation.rs` checks that each page with Rust is
/// here.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../README.md")]
    mod readme {}
    #[doc = include_str!("../docs/appending.md")]
    mod appending {}
    #[doc = include_str!("../docs/projectors-in-rust.md")]
    mod projectors_in_rust {}
}
