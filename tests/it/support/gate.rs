//! A gate at which a task waits until the test opens it. The test can also wait for the task to
//! arrive.

use std::sync::Arc;

use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use super::TIMEOUT;

/// Closed until it is opened; then it stays open. Clones share one gate.
#[derive(Clone)]
pub struct Gate {
    arrivals: Arc<Semaphore>,
    open: watch::Sender<bool>,
}

impl Gate {
    pub fn new() -> Self {
        Gate { arrivals: Arc::new(Semaphore::new(0)), open: watch::Sender::new(false) }
    }

    /// Reports an arrival and waits until the gate is open.
    pub async fn pass(&self) {
        self.arrivals.add_permits(1);
        self.open.subscribe().wait_for(|&open| open).await.expect("the gate exists");
    }

    /// Waits until a task has arrived. Each call waits for another arrival.
    pub async fn arrival(&self) {
        let arrival = timeout(TIMEOUT, self.arrivals.acquire()).await;
        arrival.expect("a task arrives at the gate").expect("the gate exists").forget();
    }

    pub fn open(&self) {
        self.open.send_replace(true);
    }
}
