//! The simulated processes. Each mirrors the control flow of a part of the engine and calls the
//! engine's code for the decisions.

pub(super) mod boot;
mod engine;
mod high_water;
pub(super) mod play;
pub(super) mod relay;
pub(super) mod retire;
pub(super) mod writer;

/// How a process ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// A boot ran to its end. `released`: the release may be deployed.
    Booted { released: bool },
    /// Any other process ended, or a boot gave up after database errors.
    Done,
}
