#![doc = include_str!("../README.md")]
#![warn(missing_docs)]
// Imports run from commands down to words.

// — words: values and rules —
mod chain;
mod error;
mod event;
mod lifecycle;
mod metrics;
mod projector;
mod registry;
mod retry;
mod text;

// — edges: SQL and AWS —
mod aws;
mod database;
mod ledger;
mod multi_row;
mod queue;
mod read_model;
mod store;
// Projectors that are declared in files.
mod declared;

// — engine —
mod apply;
mod boot;
mod catch_up;
mod deliver;
mod handoff;
mod hang_up;
mod held;
mod lag;
mod lambda;
mod play;
mod relay;

// — commands —
mod command;
mod config;
mod telemetry;

// — the model of all this, and what it must never do —
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod spoiled;

// — what CI counts —
#[cfg(test)]
mod hot_path;

pub use anyhow;
pub use async_trait::async_trait;
pub use sqlx;
pub use time;

pub use boot::{BootProgress, BootReport, BootSettings, BootWaiting, Booted, boot};
pub use command::run;
pub use database::Database;
pub use declared::{LoadError, load};
pub use deliver::Limits;
pub use error::Error;
pub use event::{Event, NewEvent, Position, Recorded, TOMBSTONE};
pub use ledger::{Entry, Ledger};
pub use lifecycle::{FailedEvent, Failure, Status};
pub use multi_row::MultiRowInsert;
pub use play::{ConvoyBudget, PlaySettings, Played, play};
pub use projector::{EventTypes, Mode, Projector, ProjectorId, SessionUse};
pub use queue::{Queue, QueueError, Receipt, Received, SqsQueue};
pub use registry::{Registry, RegistryError};
pub use relay::RelaySettings;
pub use store::{AppendError, Appended, EventStore};
