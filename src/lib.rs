#![doc = include_str!("../README.md")]
// Layers, from the top. Imports point downward only; `tests/it/layers.rs` checks it.
mod command;
mod telemetry;

mod lambda;

mod engine;

mod declared;

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

pub use command::run;
pub use database::Database;
pub use database::multi_row::MultiRowInsert;
pub use declared::{LoadError, load};
pub use engine::boot::{BootProgress, BootReport, BootSettings, BootWait, ProjectorOutcome, boot};
pub use engine::play::{BackgroundLimits, PlayReport, PlaySettings, play};
pub use engine::relay::RelaySettings;
pub use engine::retry::Limits;
pub use ledger::{Entry, Ledger};
pub use model::error::Error;
pub use model::event::{Event, FILLER, NewEvent, Position, RecordedEvent};
pub use model::lifecycle::{FailedEvent, Failure, Status};
pub use model::projector::{EventTypes, Mode, Projector, ProjectorId, SessionUse};
pub use model::registry::{Registry, RegistryError};
pub use queue::{Queue, QueueError, Receipt, ReceivedMessage, SqsQueue};
pub use store::{AppendError, AppendOutcome, EventStore};
