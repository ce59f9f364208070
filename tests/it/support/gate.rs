//! A gate: the test knows that somebody stands before it, and decides when he may go on.

use std::sync::Arc;

use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use super::TIMEOUT;

/// Shut until it is opened; then it stays open. Clones are the same gate.
#[derive(Clone)]
pub struct Gate {
    arrivals: Arc<Semaphore>,
    open: watch::Sender<bool>,
}

impl Gate {
    pub fn new() -> Self {
        Gate { arrivals: Arc::new(Semaphore::new(0)), open: watch::Sender::new(false) }
    }

    /// Stands before the gate until it is open.
    pub async fn pass(&self) {
        self.arrivals.add_permits(1);
        self.open.subscribe().wait_for(|&open| open).await.expect("the gate stands");
    }

    /// Waits until somebody stands before it, each time another one.
    pub async fn arrival(&self) {
        let arrival = timeout(TIMEOUT, self.arrivals.acquire()).await;
        arrival.expect("somebody comes to the gate").expect("the gate stands").forget();
    }

    pub fn open(&self) {
        self.open.send_replace(true);
    }
}
