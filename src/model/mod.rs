//! Values and rules, without I/O.

pub(crate) mod backoff;
pub(crate) mod continuity;
pub(crate) mod event;
pub(crate) mod external;
pub(crate) mod lifecycle;
pub(crate) mod metrics;
pub(crate) mod projector;
pub(crate) mod registry;
pub(crate) mod retry_later;
pub(crate) mod retrying;
pub(crate) mod running_statement;
pub(crate) mod server_json;
pub(crate) mod signature;
pub(crate) mod spelling;
pub(crate) mod text;
pub(crate) mod wait_log;
