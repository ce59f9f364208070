//! The engine moves events from the log to the projectors. It contains boot, play and the steps
//! that they share.

pub(crate) mod apply;
pub(crate) mod boot;
pub(crate) mod catch_up;
pub(crate) mod closed_connection;
pub(crate) mod error;
mod fenced;
pub(crate) mod handoff;
pub(crate) mod lag;
pub(crate) mod play;
pub(crate) mod relay;
pub(crate) mod retries;
pub(crate) mod retry;
pub(crate) mod stall_watch;
