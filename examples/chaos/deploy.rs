//! Deploys, as a team would carry them out: a boot with the new release and then new workers, or
//! the old release again. Projectors that no release has any more are retired.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use projectionist::sqlx;

use crate::figures::Figures;
use crate::fold::{self, Retired};
use crate::parts::Parts;
use crate::process::{Kind, ProcessTable};
use crate::release::Release;
use crate::supervisor::Supervisor;

/// A failed deploy is repeated this often. Faults may kill each attempt.
const ATTEMPTS: u32 = 6;

/// The releases that are deployed.
pub struct Deploys {
    pub processes: Arc<ProcessTable>,
    pub parts: Arc<Parts>,
    pub figures: Arc<Figures>,
    pub releases: PathBuf,
    /// The newest release that was ever created.
    newest: Release,
    current: Release,
    previous: Release,
    /// Projectors that were retired, and do not return.
    pub retired: Vec<Retired>,
}

impl Deploys {
    pub fn new(
        processes: &Arc<ProcessTable>,
        parts: &Arc<Parts>,
        figures: &Arc<Figures>,
        releases: PathBuf,
        first: &Release,
    ) -> Self {
        Deploys {
            processes: Arc::clone(processes),
            parts: Arc::clone(parts),
            figures: Arc::clone(figures),
            releases,
            newest: first.clone(),
            current: first.clone(),
            previous: first.clone(),
            retired: Vec::new(),
        }
    }

    /// Deploys a new release with a new projector, booted by `hosts` processes at once. One worker
    /// gets the new release, the other one the previous release.
    pub async fn deploy(&mut self, supervisor: &Supervisor, hosts: usize) -> anyhow::Result<()> {
        // The fragile projector is fixed only if it is broken. Otherwise the next bad event could
        // not break it.
        let mut release = self.newest.next(&self.releases, self.is_fragile_broken().await)?;
        self.newest = release.clone();
        for _ in 0..ATTEMPTS {
            let boots = (0..hosts).map(|_| self.boot(&release));
            let mut codes = Vec::new();
            // All boots have started before the first one is waited for.
            for boot in boots.collect::<anyhow::Result<Vec<_>>>()? {
                codes.push(boot.wait().await.code);
            }
            if hosts > 1 {
                self.figures.add("boots_at_once", hosts as u64);
            }
            if codes.contains(&Some(0)) {
                supervisor.deploy("play-1", &release);
                supervisor.deploy("play-2", &self.current);
                self.previous = std::mem::replace(&mut self.current, release);
                self.figures.add("deploys", 1);
                return Ok(());
            }
            self.figures.add("boots_failed", 1);
            if codes.contains(&Some(1)) {
                release = release.fixed(&self.releases)?;
                self.rebuild(&release).await?;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        self.figures.add("deploys_abandoned", 1);
        Ok(())
    }

    /// Boots and deploys the previous release again, unchanged. Projectors that it does not have
    /// stay at their positions.
    pub async fn roll_back(&mut self, supervisor: &Supervisor) -> anyhow::Result<()> {
        if !self.current.is_newer_than(&self.previous) {
            self.deploy(supervisor, 1).await?;
        }
        self.boot(&self.previous)?.wait().await;
        supervisor.deploy("play-1", &self.previous);
        supervisor.deploy("play-2", &self.previous);
        if self.current.is_newer_than(&self.previous) {
            self.figures.add("deploys_rolled_back", 1);
        }
        self.current = self.previous.clone();
        Ok(())
    }

    /// Retires a projector that neither of the two deployed releases has any more. The worker that
    /// is never killed may still have it, because that worker stays on the first release.
    pub async fn retire(&mut self, supervisor: &Supervisor) -> anyhow::Result<()> {
        let mut found = self.retirable().await.ok().flatten();
        for _ in 0..ATTEMPTS {
            if found.is_some() {
                break;
            }
            self.deploy(supervisor, 1).await?;
            found = self.retirable().await.ok().flatten();
        }
        let (name, mode) = found.context("no projector can be retired")?;
        for _ in 0..ATTEMPTS {
            let arguments = ["retire", &name, "--yes", "--projectors", self.current.path()];
            let (process, _) = self.processes.start(Kind::Retire, "retire", &arguments)?;
            process.wait().await;
            // The process may have been killed, or have lost its connection, after it had
            // committed. Only the ledger shows the result.
            if let Ok(Some(rows)) = self.rows_if_gone(&name).await {
                self.figures.add("retired", 1);
                self.retired.push(Retired { name, mode, rows });
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        bail!("{name} could not be retired")
    }

    /// Retires the projectors that must be rebuilt, so that the next boot builds them again.
    async fn rebuild(&self, release: &Release) -> anyhow::Result<()> {
        for _ in 0..ATTEMPTS {
            let names = match self.projectors_to_rebuild().await {
                Ok(names) if names.is_empty() => return Ok(()),
                names => names.unwrap_or_default(),
            };
            for name in names {
                let arguments =
                    ["retire", &name, "--yes", "--force", "--projectors", release.path()];
                let (process, _) = self.processes.start(Kind::Retire, "rebuild", &arguments)?;
                process.wait().await;
                // The process may have been killed, or have lost its connection, after it had
                // committed. Only the ledger shows the result.
                if let Ok(Some(_)) = self.rows_if_gone(&name).await {
                    self.figures.add("rebuilt", 1);
                }
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }

    async fn projectors_to_rebuild(&self) -> anyhow::Result<Vec<String>> {
        let sql = "select name from projectors where rebuild_reason is not null";
        Ok(sqlx::query_scalar(sql).fetch_all(&mut self.parts.connect().await?).await?)
    }

    /// Boots a release in which a projector subscribes to more event types. Boot must refuse it.
    pub async fn widen(&self) -> anyhow::Result<()> {
        let release = self.current.widened(&self.releases)?;
        for _ in 0..ATTEMPTS {
            let arguments = ["boot", "--projectors", release.path(), "--release", &release.name];
            let (boot, _) = self.processes.start(
                Kind::Refused,
                &format!("boot-{}", release.name),
                &arguments,
            )?;
            let ended = boot.wait().await;
            let log = std::fs::read_to_string(&boot.log)?;
            if ended.code == Some(0) {
                self.figures.add_finding(format!(
                    "a wider subscription was released: {}",
                    boot.log.display()
                ));
                return Ok(());
            }
            if log.contains("fragile@1: it subscribes to more event types") {
                self.figures.add("widenings_refused", 1);
                return Ok(());
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        bail!("no boot got as far as refusing a wider subscription")
    }

    /// The name and the mode of a projector that neither release has.
    async fn retirable(&self) -> anyhow::Result<Option<(String, String)>> {
        let older =
            if self.current.is_newer_than(&self.previous) { &self.previous } else { &self.current };
        let sql = "select name, mode from projectors";
        let mut known: Vec<(String, String)> =
            sqlx::query_as(sql).fetch_all(&mut self.parts.connect().await?).await?;
        known.retain(|(name, _)| older.removed_projectors().any(|removed| removed == *name));
        Ok(fastrand::choice(known))
    }

    /// The number of rows of a projector, or `None` if the projector is still in the ledger.
    async fn rows_if_gone(&self, name: &str) -> anyhow::Result<Option<usize>> {
        let mut connection = self.parts.connect().await?;
        if fold::is_in_ledger(&mut connection, name).await? {
            return Ok(None);
        }
        Ok(Some(fold::rows(&mut connection, name).await?.len()))
    }

    fn boot(&self, release: &Release) -> anyhow::Result<Arc<crate::process::Process>> {
        self.figures.add("boots", 1);
        let arguments = ["boot", "--projectors", release.path(), "--release", &release.name];
        let (process, _) =
            self.processes.start(Kind::Boot, &format!("boot-{}", release.name), &arguments)?;
        Ok(process)
    }

    async fn is_fragile_broken(&self) -> bool {
        let query = async {
            let mut connection = self.parts.connect().await?;
            let sql =
                "select count(*) from projectors where name = 'fragile' and status = 'broken'";
            let broken: i64 = sqlx::query_scalar(sql).fetch_one(&mut connection).await?;
            anyhow::Ok(broken > 0)
        };
        query.await.unwrap_or(true)
    }

    /// Boots the newest release after all faults, with its projectors fixed. The first boot may
    /// report projectors that must be rebuilt; then the second boot must succeed. Returns the
    /// release.
    pub async fn boot_fixed(&mut self) -> anyhow::Result<Release> {
        let release = self.newest.fixed(&self.releases)?;
        // The first boot reports what must be rebuilt, and the second one builds it.
        for _ in 0..2 {
            let boot = self.boot(&release)?;
            let ended = tokio::time::timeout(Duration::from_secs(300), boot.wait()).await;
            let code = ended.context("the last boot does not end")?.code;
            let names = self.projectors_to_rebuild().await?;
            match code {
                Some(0) => return Ok(release),
                Some(1) if !names.is_empty() => {
                    let log = std::fs::read_to_string(&boot.log)?;
                    if let Some(name) =
                        names.iter().find(|name| !log.contains(&format!("{name}@1: ")))
                    {
                        self.figures.add_finding(format!(
                            "boot does not say that {name} must be rebuilt: {}",
                            boot.log.display()
                        ));
                    }
                    self.rebuild(&release).await?;
                }
                code => bail!(
                    "the last boot, of {}, ended with {code:?} although faults had ended: {}",
                    release.name,
                    boot.log.display()
                ),
            }
        }
        bail!("the last boot, of {}, was refused twice although faults had ended", release.name)
    }
}
