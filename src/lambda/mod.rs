//! AWS Lambda: the events that invoke a function, the client of the runtime API, and scheduled
//! invocations. The worker of `play` applies the messages, too.

mod event;
mod runtime_api;
mod scheduled;

pub(crate) use event::{Trigger, parse};
pub(crate) use runtime_api::{RUNTIME_API, RuntimeApi};
pub(crate) use scheduled::relay_and_reconcile;
