mod chain;
mod error;
mod event;
mod lifecycle;
mod projector;
mod registry;
mod retry;

mod database;
mod declared;
mod ledger;
mod queue;
mod store;

mod apply;
mod boot;
mod catch_up;
mod deliver;
mod handoff;
mod play;
mod relay;

mod command;
mod config;
mod telemetry;

pub use async_trait::async_trait;
pub use sqlx;

pub use boot::{BootProgress, BootReport, Booted, boot};
pub use command::run;
pub use database::Database;
pub use deliver::Limits;
pub use error::Error;
pub use event::{Event, NewEvent, Position, TOMBSTONE};
pub use ledger::{Entry, Ledger};
pub use lifecycle::{FailedEvent, Failure, Status};
pub use play::{PlaySettings, Played, play};
pub use projector::{EventTypes, Mode, Projector, ProjectorId};
pub use queue::{Queue, QueueError, Receipt, Received, SqsQueue};
pub use registry::{Registry, RegistryError};
pub use relay::RelaySettings;
pub use store::{AppendError, Appended, EventStore};
