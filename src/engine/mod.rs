//! What moves events from the log to the projectors: boot and play, and the steps they share.

pub(crate) mod apply;
pub(crate) mod boot;
pub(crate) mod catch_up;
pub(crate) mod deliver;
pub(crate) mod handoff;
pub(crate) mod interrupt;
pub(crate) mod lag;
pub(crate) mod play;
pub(crate) mod relay;
pub(crate) mod stall_watch;
