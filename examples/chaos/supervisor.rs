//! The services of a run. A process that ends is replaced by a new one, as a container platform
//! would do.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::figures::Figures;
use crate::process::{GRACE, Kind, Process, ProcessTable};
use crate::release::Release;
use crate::writer::{self, Record};

/// One service, which always has a process until it is closed.
pub struct Service {
    name: &'static str,
    kind: Kind,
    options: &'static [&'static str],
    release: Mutex<Release>,
    current: Mutex<Option<Arc<Process>>>,
    closed: AtomicBool,
}

/// All services of a run.
pub struct Supervisor {
    services: Vec<(Arc<Service>, JoinHandle<()>)>,
    appending: Arc<AtomicBool>,
    appenders: Vec<JoinHandle<()>>,
}

impl Supervisor {
    /// Starts three workers, a relay, and four applications. One worker is never killed, and one
    /// has no relay of its own. Two applications append in plain SQL, and two with `append`.
    pub fn start(
        processes: &Arc<ProcessTable>,
        records: &Path,
        release: &Release,
        figures: &Arc<Figures>,
    ) -> anyhow::Result<Self> {
        let services = [
            ("play-1", Kind::Play, &["--receive-wait", "2", "--grace-period", GRACE][..]),
            ("play-2", Kind::Play, &["--receive-wait", "2", "--grace-period", GRACE, "--no-relay"]),
            ("survivor", Kind::Survivor, &["--receive-wait", "2", "--grace-period", GRACE]),
            ("relay", Kind::Relay, &["--message-events", "20"]),
            ("writer-1", Kind::Writer, &[]),
            ("writer-2", Kind::Writer, &[]),
        ];
        let supervised = services.map(|(name, kind, options)| {
            let service = Arc::new(Service {
                name,
                kind,
                options,
                release: Mutex::new(release.clone()),
                current: Mutex::new(None),
                closed: AtomicBool::new(false),
            });
            let task = supervise(
                Arc::clone(&service),
                Arc::clone(processes),
                records.join(name),
                Arc::clone(figures),
            );
            (service, tokio::spawn(task))
        });
        let appending = Arc::new(AtomicBool::new(true));
        let mut appenders = Vec::new();
        for name in ["append-1", "append-2"] {
            let mut record = Record::open(&records.join(name))?;
            let (processes, appending, figures) =
                (Arc::clone(processes), Arc::clone(&appending), Arc::clone(figures));
            appenders.push(tokio::spawn(async move {
                while appending.load(Ordering::SeqCst) {
                    if let Err(error) = writer::append(&processes, name, &mut record).await {
                        figures.add_finding(format!("{name}: {error:#}"));
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(100..1_000))).await;
                }
            }));
        }
        Ok(Supervisor { services: supervised.into(), appending, appenders })
    }

    /// Gives a worker another release: its process is stopped, and the next one uses the release.
    pub fn deploy(&self, worker: &str, release: &Release) {
        for (service, _) in self.services.iter().filter(|(service, _)| service.name == worker) {
            *service.release.lock().expect("the lock is not poisoned") = release.clone();
            if let Some(process) = &*service.current.lock().expect("the lock is not poisoned") {
                process.signal("TERM");
            }
        }
    }

    /// Stops all applications.
    pub async fn stop_writing(&mut self) {
        self.appending.store(false, Ordering::SeqCst);
        self.close(|kind| kind == Kind::Writer).await;
        for appender in self.appenders.drain(..) {
            let _ = appender.await;
        }
    }

    /// Stops all workers but the survivor, and the relay.
    pub async fn stop_all_but_survivor(&mut self) {
        self.close(|kind| matches!(kind, Kind::Play | Kind::Relay)).await;
    }

    /// Stops all services that are left.
    pub async fn stop(&mut self) {
        self.close(|_| true).await;
    }

    async fn close(&mut self, is_chosen: impl Fn(Kind) -> bool) {
        let (closing, open): (Vec<_>, Vec<_>) =
            self.services.drain(..).partition(|(service, _)| is_chosen(service.kind));
        self.services = open;
        for (service, _) in &closing {
            service.closed.store(true, Ordering::SeqCst);
            if let Some(process) = &*service.current.lock().expect("the lock is not poisoned") {
                process.signal("TERM");
            }
        }
        for (_, task) in closing {
            let _ = task.await;
        }
    }
}

/// Keeps a process of the service running until the service is closed.
async fn supervise(
    service: Arc<Service>,
    processes: Arc<ProcessTable>,
    record: std::path::PathBuf,
    figures: Arc<Figures>,
) {
    while !service.closed.load(Ordering::SeqCst) {
        let started = {
            let release = service.release.lock().expect("the lock is not poisoned");
            let record = record.to_string_lossy();
            let mut arguments = match service.kind {
                Kind::Writer => vec!["write", service.name, &record],
                Kind::Play | Kind::Survivor => {
                    vec!["play", "--projectors", release.path(), "--release", &release.name]
                }
                kind => vec![kind.as_str()],
            };
            arguments.extend(service.options);
            let started = processes.start(service.kind, service.name, &arguments);
            started.inspect(|(process, _)| {
                let mut current = service.current.lock().expect("the lock is not poisoned");
                *current = Some(Arc::clone(process));
            })
        };
        match started {
            Ok((process, _)) => _ = process.wait().await,
            Err(error) => figures.add_finding(format!("{}: {error:#}", service.name)),
        }
        tokio::time::sleep(Duration::from_millis(fastrand::u64(50..500))).await;
    }
}
