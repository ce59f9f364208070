//! Helpers for unit tests.

pub(crate) mod corrupted;
pub(crate) mod hot_path;
