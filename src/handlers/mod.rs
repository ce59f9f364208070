//! Projectors in other languages: processes that speak JSON lines on standard input and output.

mod conformance;
mod host;
mod process;
mod projector;
mod protocol;
mod stderr;

pub(crate) use conformance::{CASES, Conformance};
pub(crate) use process::CommandSpec;
pub(crate) use projector::{CommandProjector, Processes};
