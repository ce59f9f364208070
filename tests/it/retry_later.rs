//! A handler that asks for a later retry breaks no projector and delays no other.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use projectionist::time::OffsetDateTime;
use projectionist::{
    BackgroundLimits, Database, Limits, Queue, RetryLater, anyhow, boot, load, play,
};

use crate::support::{Folder, TIMEOUT, Tally, World, eventually, registry};

const MINUTE: Duration = Duration::from_secs(60);

/// A service that handlers call, which is down at first.
#[derive(Clone)]
struct MailGateway {
    is_up: Arc<AtomicBool>,
    refused: Arc<AtomicU64>,
    /// The delay that its handlers ask for.
    delay: Duration,
}

impl MailGateway {
    fn with_delay(delay: Duration) -> Self {
        MailGateway { is_up: Arc::default(), refused: Arc::default(), delay }
    }

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
                return Err(anyhow::Error::from(later.after(gateway.delay)).context("cannot send"));
            }
            Ok(())
        })
    }
}

#[tokio::test]
async fn a_projector_that_asks_for_a_retry_stays_live_and_the_others_go_on() {
    let world = World::new().await;
    let gateway = MailGateway::with_delay(Duration::from_millis(20));
    let mailer = gateway.called_at(25, Tally::new("a_mailer"));
    let other = Tally::new("other");
    let registry = registry(&[&mailer, &other]);
    world.boot(&registry).await;
    let playing = world.start_play(&registry);
    world.append(40).await;
    eventually("the other projector is at the end", async || world.position("other").await == 40)
        .await;
    eventually("the event was tried again", async || gateway.refused() >= 5).await;
    assert_eq!((world.status("a_mailer").await, world.position("a_mailer").await), {
        ("live".into(), 24)
    });
    gateway.start();
    eventually("the mailer is at the end", async || world.position("a_mailer").await == 40).await;
    assert_eq!(playing.stop().await.broken, 0);
    world.assert_complete(&mailer).await;
    world.assert_complete(&other).await;
}

#[tokio::test]
async fn a_wait_is_in_the_ledger_and_a_new_worker_respects_it() {
    let world = World::new().await;
    let gateway = MailGateway::with_delay(30 * MINUTE);
    let mailer = gateway.called_at(25, Tally::new("mailer"));
    let other = Tally::new("other");
    let registry = registry(&[&mailer, &other]);
    world.boot(&registry).await;
    world.append(40).await;
    let playing = world.start_play(&registry);
    let retrying = async || world.entry("mailer").await.and_then(|entry| entry.retrying);
    eventually("the wait is stored", async || retrying().await.is_some()).await;
    let wait = retrying().await.expect("it is stored");
    assert_eq!(wait.reason, "cannot send: the mail gateway answered 503");
    assert_eq!(u64::from(wait.attempts), gateway.refused());
    let left = wait.next_attempt - OffsetDateTime::now_utc();
    assert!(left > 25 * MINUTE && left < 35 * MINUTE, "{left}");
    assert!(wait.since <= OffsetDateTime::now_utc() && !wait.is_alerted, "{wait:?}");
    playing.stop().await;

    let refused = gateway.refused();
    let restarted = world.start_play(&registry);
    world.append(10).await;
    eventually("the other projector goes on", async || world.position("other").await == 50).await;
    restarted.stop().await;
    assert_eq!(gateway.refused(), refused, "the delay is not over");

    gateway.start();
    world.execute("update projectors set retry_at = utc_timestamp(6) where name = 'mailer'").await;
    world.play_until_idle(&registry).await;
    assert_eq!(retrying().await, None);
    assert_eq!(world.number("select count(*) from projectors where retry_at is null").await, 2);
    world.assert_complete(&mailer).await;
}

#[tokio::test]
async fn a_projector_that_asks_for_retries_beyond_the_limit_breaks_with_the_reason() {
    let world = World::new().await;
    let gateway = MailGateway::with_delay(Duration::from_millis(50));
    let mailer = gateway.called_at(25, Tally::new("mailer"));
    let registry = registry(&[&mailer]);
    world.boot(&registry).await;
    world.append(40).await;
    let settings = World::play_settings();
    let limits = settings.limits.with_retry_later_limit(Duration::from_millis(300));
    let settings = settings.with_limits(limits);
    let played =
        world.play_with(Arc::clone(&world.queue) as Arc<dyn Queue>, &registry, settings).await;
    assert_eq!(played.broken, 1);
    assert!(gateway.refused() >= 3, "{}", gateway.refused());
    world.assert_broken("mailer", 25, "--retry-later-limit").await;
    world.assert_broken("mailer", 25, "cannot send: the mail gateway answered 503").await;
    let entry = world.entry("mailer").await.expect("it is in the ledger");
    let attempts = entry.status.failure().expect("it is broken").attempts;
    assert_eq!((u64::from(attempts), entry.retrying), (gateway.refused(), None));
    world.assert_folded(&mailer).await;
}

#[tokio::test]
async fn a_boot_hands_the_others_over_and_waits_for_the_one_that_retries() {
    let world = World::new().await;
    world.append(40).await;
    let gateway = MailGateway::with_delay(Duration::from_millis(50));
    let mailer = gateway.called_at(25, Tally::new("a_mailer"));
    let other = Tally::new("other");
    let registry = registry(&[&mailer, &other]);
    let limits =
        Limits::default().with_batch(10).with_retry_timeout(Some(Duration::from_millis(700)));
    let mut waits = Vec::new();
    let report = boot(&world.database, &registry, limits, |progress| {
        waits.extend(progress.wait.as_ref().map(|wait| wait.reason.clone()));
    })
    .await
    .expect("boot ends");
    assert!(!report.is_released());
    let explained = report.explain();
    for part in ["a_mailer@1", "event 25", "the mail gateway answered 503", "Run boot again"] {
        assert!(explained.contains(part), "{explained}");
    }
    assert!(
        waits.iter().any(|wait| wait.contains("a_mailer@1 is retrying event 25")),
        "the wait is reported: {waits:?}"
    );
    assert_eq!(
        (world.status("a_mailer").await, world.position("a_mailer").await),
        ("booting".into(), 24)
    );
    assert_eq!(world.status("other").await, "live");

    gateway.start();
    assert!(world.boot(&registry).await.is_released());
    world.assert_complete(&mailer).await;
}

#[tokio::test]
async fn a_live_projector_that_retries_stops_no_boot_of_others() {
    let world = World::new().await;
    let gateway = MailGateway::with_delay(30 * MINUTE);
    let mailer = gateway.called_at(25, Tally::new("mailer"));
    let new = Tally::new("new");
    world.boot(&registry(&[&mailer])).await;
    world.append(40).await;
    let playing = world.start_play(&registry(&[&mailer]));
    eventually("the mailer waits", async || {
        world.entry("mailer").await.is_some_and(|entry| entry.retrying.is_some())
    })
    .await;
    let report = world.boot(&registry(&[&mailer, &new])).await;
    assert!(report.is_released(), "{}", report.explain());
    playing.stop().await;
    world.assert_complete(&new).await;
}

/// With so few connections, only one projector at a time catches up in the background.
#[tokio::test]
async fn a_projector_that_waits_in_the_background_delays_no_catch_up() {
    let world = World::new().await;
    let gateway = MailGateway::with_delay(30 * MINUTE);
    let mailer = gateway.called_at(5, Tally::new("mailer"));
    let behind = Tally::new("behind");
    let both = registry(&[&mailer, &behind]);
    world.boot(&both).await;
    world.append(10).await;
    let playing = world.start_play(&registry(&[&mailer]));
    eventually("the mailer waits", async || {
        world.entry("mailer").await.is_some_and(|entry| entry.retrying.is_some())
    })
    .await;
    world.append(400).await;
    playing.stop().await;
    let database =
        Database::connect(&world.database_url, 4, TIMEOUT).await.expect("the server answers");
    let settings = World::continuous_play_settings()
        .with_background_after(BackgroundLimits::default().with_events(50));
    let caught_up = eventually("the other projector has caught up", async || {
        world.position("behind").await == 410
    });
    let queue = Arc::clone(&world.queue) as Arc<dyn Queue>;
    play(&database, queue, &both, settings, caught_up).await.expect("play succeeds");
    assert_eq!(world.position("mailer").await, 4);
}

// Side effects.

/// How often each event was sent to the outside.
#[derive(Clone, Default)]
struct Outbox(Arc<Mutex<HashMap<u64, u64>>>);

impl Outbox {
    /// A tally with side effects that sends each event, and then fails at `poison`.
    fn sender(&self, poison: u64) -> Tally {
        let outbox = self.clone();
        Tally::new("sender").with_side_effects().hook(move |event| {
            let position = event.position().get();
            *outbox.0.lock().expect("no panic").entry(position).or_default() += 1;
            anyhow::ensure!(position != poison, "the address is unknown");
            Ok(())
        })
    }

    fn sent_twice(&self) -> Vec<u64> {
        let sent = self.0.lock().expect("no panic");
        sent.iter().filter(|(_, times)| **times > 1).map(|(position, _)| *position).collect()
    }

    fn count(&self) -> usize {
        self.0.lock().expect("no panic").len()
    }
}

#[tokio::test]
async fn a_failing_event_never_repeats_the_side_effects_of_the_events_before_it() {
    for in_boot in [true, false] {
        let world = World::new().await;
        let outbox = Outbox::default();
        let registry = registry(&[&outbox.sender(50)]);
        if in_boot {
            world.append(100).await;
            assert!(!world.boot(&registry).await.is_released());
        } else {
            world.boot(&registry).await;
            world.append(100).await;
            assert_eq!(world.play_until_idle(&registry).await.broken, 1);
        }
        world.assert_broken("sender", 50, "the address is unknown").await;
        assert_eq!((outbox.count(), outbox.sent_twice()), (50, vec![]), "in boot: {in_boot}");
    }
}

/// A MyISAM table has no transactions, so a row in it is an effect that cannot be rolled back.
#[tokio::test]
async fn a_failing_event_of_a_file_never_repeats_the_side_effects_of_the_events_before_it() {
    for in_boot in [true, false] {
        let world = World::new().await;
        world.execute("create table sent (position bigint) engine = myisam").await;
        let folder = Folder::new().with(
            "sender.toml",
            "name = 'sender'\nversion = 1\nmode = 'from_beginning'\nside_effects = true\n\
             setup = ['create table if not exists letters (position bigint, \
             check (position <> 50))']\n\
             [[on]]\nevents = ['*']\nsql = 'insert into sent values (:position)'\n\
             [[on]]\nevents = ['*']\nsql = 'insert into letters values (:position)'\n",
        );
        let mut registry = projectionist::Registry::new();
        load(folder.path().as_ref(), &mut registry).expect("the file is valid");
        if in_boot {
            world.append(100).await;
            assert!(!world.boot(&registry).await.is_released());
        } else {
            world.boot(&registry).await;
            world.append(100).await;
            assert_eq!(world.play_until_idle(&registry).await.broken, 1);
        }
        world.assert_broken("sender", 50, "sender.toml:").await;
        let before = "select count(*) from sent where position < 50";
        assert_eq!(world.number(before).await, 49, "in boot: {in_boot}");
        assert_eq!(world.number("select count(*) from sent where position > 50").await, 0);
    }
}

#[tokio::test]
async fn an_undecodable_event_is_reported_before_a_handler_with_side_effects_runs() {
    let world = World::new().await;
    world.append(3).await;
    let garbled = projectionist::NewEvent::new("case-0", "Amended", r#"{"note":"garbled"}"#);
    world.store.append(&[garbled]).await.expect("the event is stored");
    let url = world.database_url_with_replaced_text(b"garbled", b"\xffarbled").await;
    let database = Database::connect(&url, 8, TIMEOUT).await.expect("the server answers");
    let outbox = Outbox::default();
    let registry = registry(&[&outbox.sender(0)]);
    let limits = Limits::default().with_batch(100);
    let report = boot(&database, &registry, limits, |_| {}).await.expect("boot ends");
    assert!(!report.is_released());
    world.assert_broken("sender", 4, "event 4 cannot be decoded").await;
    assert_eq!(outbox.count(), 3, "the handler did not see event 4");
}

// Transient errors of the server.

/// A trigger that refuses inserts with a transient error for as long as `refusing` has a row.
#[tokio::test]
async fn a_file_whose_table_refuses_rows_for_the_moment_waits_and_the_others_go_on() {
    let world = World::new().await;
    let folder = Folder::new()
        .with("a.toml", &Tally::new("refused").file(&[]))
        .with("b.toml", &Tally::new("other").file(&[]));
    let mut registry = projectionist::Registry::new();
    load(folder.path().as_ref(), &mut registry).expect("the files are valid");
    world.boot(&registry).await;
    world.execute("create table refusing (n int)").await;
    world.execute("insert into refusing values (1)").await;
    world
        .execute(
            "create trigger refuse before insert on refused for each row \
             if new.position = 25 and exists (select 1 from refusing) then \
             signal sqlstate 'HY000' set mysql_errno = 1205, message_text = 'Lock wait timeout'; \
             end if",
        )
        .await;
    world.append(40).await;
    let playing = world.start_play(&registry);
    eventually("the wait is stored", async || {
        world.entry("refused").await.is_some_and(|entry| entry.retrying.is_some())
    })
    .await;
    let entry = world.entry("refused").await.expect("it is in the ledger");
    assert_eq!((entry.status.as_str(), entry.position.get()), ("live", 24));
    let reason = entry.retrying.expect("it waits").reason;
    assert!(reason.contains("a.toml:5") && reason.contains("1205"), "{reason}");
    eventually("the other projector is at the end", async || world.position("other").await == 40)
        .await;
    world.execute("delete from refusing").await;
    eventually("the projector is at the end", async || world.position("refused").await == 40).await;
    assert_eq!(playing.stop().await.broken, 0);
    world.assert_complete(&Tally::new("refused")).await;
}
