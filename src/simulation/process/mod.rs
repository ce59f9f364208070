//! The processes. Each mirrors the control flow of a part of the engine and takes its decisions
//! from it.

pub(super) mod boot;
mod engine;
mod high_water;
pub(super) mod play;
pub(super) mod relay;
pub(super) mod retire;
pub(super) mod writer;

/// How a process ended that is meant to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// A boot that came to its end: the release may go on, or not.
    Booted { released: bool },
    /// Everything else, also a boot that gave up on the database.
    Done,
}
