//! The posts that must be manned: a process that ends is followed by another, as a container platform would.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::figures::Figures;
use crate::process::{GRACE, Kind, Process, Yard};
use crate::release::Release;
use crate::writer::{self, Record};

/// One post, manned until it is closed.
pub struct Post {
    name: &'static str,
    kind: Kind,
    options: &'static [&'static str],
    release: Mutex<Release>,
    current: Mutex<Option<Arc<Process>>>,
    closed: AtomicBool,
}

/// All posts of a run.
pub struct Crew {
    posts: Vec<(Arc<Post>, JoinHandle<()>)>,
    appending: Arc<AtomicBool>,
    appenders: Vec<JoinHandle<()>>,
}

impl Crew {
    /// Three workers, of which one is never killed and one has no relay in it, and a relay besides; two writers by plain SQL and two by `append`.
    pub fn start(yard: &Arc<Yard>, records: &Path, release: &Release, figures: &Arc<Figures>) -> anyhow::Result<Self> {
        let posts = [
            ("play-1", Kind::Play, &["--receive-wait", "2", "--grace", GRACE][..]),
            ("play-2", Kind::Play, &["--receive-wait", "2", "--grace", GRACE, "--no-relay"]),
            ("veteran", Kind::Veteran, &["--receive-wait", "2", "--grace", GRACE]),
            ("relay", Kind::Relay, &["--message-events", "20"]),
            ("writer-1", Kind::Writer, &[]),
            ("writer-2", Kind::Writer, &[]),
        ];
        let manned = posts.map(|(name, kind, options)| {
            let post = Arc::new(Post {
                name,
                kind,
                options,
                release: Mutex::new(release.clone()),
                current: Mutex::new(None),
                closed: AtomicBool::new(false),
            });
            let task = man(Arc::clone(&post), Arc::clone(yard), records.join(name), Arc::clone(figures));
            (post, tokio::spawn(task))
        });
        let appending = Arc::new(AtomicBool::new(true));
        let mut appenders = Vec::new();
        for name in ["append-1", "append-2"] {
            let mut record = Record::open(&records.join(name))?;
            let (yard, appending, figures) = (Arc::clone(yard), Arc::clone(&appending), Arc::clone(figures));
            appenders.push(tokio::spawn(async move {
                while appending.load(Ordering::SeqCst) {
                    if let Err(error) = writer::append(&yard, name, &mut record).await {
                        figures.find(format!("{name}: {error:#}"));
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(100..1_000))).await;
                }
            }));
        }
        Ok(Crew { posts: manned.into(), appending, appenders })
    }

    /// Gives a worker another release: the one that runs is asked to end.
    pub fn deploy(&self, worker: &str, release: &Release) {
        for (post, _) in self.posts.iter().filter(|(post, _)| post.name == worker) {
            *post.release.lock().expect("no panic at a post") = release.clone();
            if let Some(process) = &*post.current.lock().expect("no panic at a post") {
                process.signal("TERM");
            }
        }
    }

    /// No more events.
    pub async fn stop_writing(&mut self) {
        self.appending.store(false, Ordering::SeqCst);
        self.close(|kind| kind == Kind::Writer).await;
        for appender in self.appenders.drain(..) {
            let _ = appender.await;
        }
    }

    /// Only the veteran plays and publishes.
    pub async fn leave_to_the_veteran(&mut self) {
        self.close(|kind| matches!(kind, Kind::Play | Kind::Relay)).await;
    }

    /// Nobody plays, nobody publishes.
    pub async fn stop(&mut self) {
        self.close(|_| true).await;
    }

    async fn close(&mut self, which: impl Fn(Kind) -> bool) {
        let (closing, open): (Vec<_>, Vec<_>) = self.posts.drain(..).partition(|(post, _)| which(post.kind));
        self.posts = open;
        for (post, _) in &closing {
            post.closed.store(true, Ordering::SeqCst);
            if let Some(process) = &*post.current.lock().expect("no panic at a post") {
                process.signal("TERM");
            }
        }
        for (_, task) in closing {
            let _ = task.await;
        }
    }
}

async fn man(post: Arc<Post>, yard: Arc<Yard>, record: std::path::PathBuf, figures: Arc<Figures>) {
    while !post.closed.load(Ordering::SeqCst) {
        let started = {
            let release = post.release.lock().expect("no panic at a post");
            let record = record.to_string_lossy();
            let mut arguments = match post.kind {
                Kind::Writer => vec!["write", post.name, &record],
                Kind::Play | Kind::Veteran => vec!["play", "--projectors", release.path(), "--release", &release.name],
                kind => vec![kind.as_str()],
            };
            arguments.extend(post.options);
            let started = yard.start(post.kind, post.name, &arguments);
            started
                .inspect(|(process, _)| *post.current.lock().expect("no panic at a post") = Some(Arc::clone(process)))
        };
        match started {
            Ok((process, _)) => _ = process.wait().await,
            Err(error) => figures.find(format!("{}: {error:#}", post.name)),
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(50..500))).await;
    }
}
