//! AWS Lambda: what a function is invoked with, how its runtime is spoken to, and what a scheduled
//! invocation does. A batch of messages goes through the worker that `play` has, too.

mod event;
mod runtime_api;
mod scheduled;

pub(crate) use event::{Trigger, parse};
pub(crate) use runtime_api::{RUNTIME_API, RuntimeApi};
pub(crate) use scheduled::relay_and_reconcile;
