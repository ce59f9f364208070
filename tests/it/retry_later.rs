//! A handler that asks for a later retry breaks no projector and delays no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use projectionist::RetryLater;

use crate::support::{Tally, World, eventually, registry};

/// A service that handlers call, which is down at first.
#[derive(Clone, Default)]
struct MailGateway {
    is_up: Arc<AtomicBool>,
    refused: Arc<AtomicU64>,
}

impl MailGateway {
    fn start(&self) {
        self.is_up.store(true, Ordering::SeqCst);
    }

    fn refused(&self) -> u64 {
        self.refused.load(Ordering::SeqCst)
    }

    /// A tally whose event at `position` calls the gateway.
    fn called_at(&self, position: u64, tally: Tally) -> Tally {
        let gateway = self.clone();
        tally.hook(move |event| {
            if event.position().get() == position && !gateway.is_up.load(Ordering::SeqCst) {
                gateway.refused.fetch_add(1, Ordering::SeqCst);
                let later = RetryLater::new("the mail gateway answered 503");
                return Err(later.after(Duration::from_millis(20)).into());
            }
            Ok(())
        })
    }
}

#[tokio::test]
async fn a_projector_that_asks_for_a_retry_stays_live_and_the_others_go_on() {
    let world = World::new().await;
    let gateway = MailGateway::default();
    let mailer = gateway.called_at(25, Tally::new("a_mailer"));
    let other = Tally::new("other");
    let registry = registry(&[&mailer, &other]);
    world.boot(&registry).await;
    let playing = world.start_play(&registry);
    world.append(40).await;
    eventually("the other projector is at the end", async || world.position("other").await == 40)
        .await;
    eventually("the event was tried again", async || gateway.refused() >= 3).await;
    assert_eq!(world.status("a_mailer").await, "live");
    gateway.start();
    eventually("the mailer is at the end", async || world.position("a_mailer").await == 40).await;
    assert_eq!(playing.stop().await.broken, 0);
    world.assert_complete(&mailer).await;
    world.assert_complete(&other).await;
}
