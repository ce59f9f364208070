//! `health`: whether a worker's loop still turns, by the file that `play --heartbeat` touches.

use std::convert::Infallible;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use tracing::warn;

use super::print;
use crate::model::error::Error;

/// How often the file is touched.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
#[command(after_help = "\
For the health check of a container. Exit code 0: the worker's loop turns, or waits as it should, for messages or for a \
database that is away. 1: it does not, and is best replaced. Lag is no part of it: a worker that is behind is not ill.")]
pub(super) struct HealthCommand {
    /// The file that `play --heartbeat` touches
    #[arg(long, value_name = "FILE", env = "PROJECTIONIST_HEARTBEAT")]
    heartbeat: PathBuf,

    /// For how long it may be untouched, in seconds
    #[arg(long, value_name = "SECONDS", env = "PROJECTIONIST_MAX_AGE", default_value_t = 30,
          value_parser = clap::value_parser!(u64).range(3..=86_400))]
    max_age: u64,
}

impl HealthCommand {
    pub(super) fn run(self) -> Result<(), Error> {
        let file = self.heartbeat.display();
        let touched = std::fs::symlink_metadata(&self.heartbeat).and_then(|file| file.modified());
        let touched = touched
            .map_err(|error| Error::Unhealthy(format!("no heartbeat in {file}: {error}")))?;
        // One that is ahead was touched before the clock was set back: that is not long ago.
        let age = SystemTime::now().duration_since(touched).unwrap_or_default().as_secs();
        match age <= self.max_age {
            true => print(format!("well: the last heartbeat was {age} s ago")),
            false => Err(Error::Unhealthy(format!(
                "the last heartbeat in {file} was {age} s ago: the worker's loop stands still"
            ))),
        }
    }
}

/// The heartbeat of a loop: touches a file for as long as it is polled. So it must be polled by the
/// task that the loop is in, and stops when that is stopped, or blocked by a handler.
pub(super) struct Heartbeat {
    file: Option<PathBuf>,
}

impl Heartbeat {
    /// With a first beat, by which it is known whether the file can be written; without a file it
    /// does nothing.
    ///
    /// # Errors
    /// [`Error::Input`] where the file cannot be written.
    pub(super) fn new(file: Option<&Path>) -> Result<Self, Error> {
        if let Some(file) = file {
            touch(file).map_err(|error| {
                Error::Input(format!(
                    "the heartbeat cannot be written to {}: {error}; name a file that can, on a volume where the root is \
                     read-only",
                    file.display()
                ))
            })?;
        }
        Ok(Heartbeat { file: file.map(Path::to_owned) })
    }

    pub(super) async fn run(&self) -> Infallible {
        let Some(file) = &self.file else { std::future::pending().await };
        let mut is_logged = false;
        loop {
            match touch(file) {
                Ok(()) => is_logged = false,
                Err(error) if !is_logged => {
                    warn!(file = %file.display(), %error, "the heartbeat cannot be written");
                    is_logged = true;
                }
                Err(_) => {}
            }
            tokio::time::sleep(HEARTBEAT_INTERVAL).await;
        }
    }
}

impl Drop for Heartbeat {
    /// Whoever has ended is not well.
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Writes a new file beside it, and gives it this name: a symbolic link of this name is replaced
/// and not followed, so that in a folder that others can write to, too, no file of ours can be
/// touched or made through it.
fn touch(file: &Path) -> std::io::Result<()> {
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let made = File::options().create_new(true).write(true).open(&temporary);
    let made = match made {
        // Left by a process of our number that was killed, or put there to be followed.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            std::fs::remove_file(&temporary)?;
            File::options().create_new(true).write(true).open(&temporary)
        }
        made => made,
    };
    made?;
    std::fs::rename(&temporary, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_does_not_follow_symbolic_links() {
        let folder = tempfile::tempdir().expect("a folder");
        let (target, link) = (folder.path().join("target"), folder.path().join("heartbeat"));
        std::fs::write(&target, "not a heartbeat").expect("written");
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        File::options()
            .write(true)
            .open(&target)
            .and_then(|file| file.set_modified(long_ago))
            .expect("dated");
        let temporary = folder.path().join(format!("heartbeat.{}", std::process::id()));
        for place in [&link, &temporary] {
            std::os::unix::fs::symlink(&target, place).expect("linked");
        }
        let missing = folder.path().join("missing");
        touch(&link).expect("touched");
        let dated =
            std::fs::metadata(&target).and_then(|file| file.modified()).expect("it is there");
        assert_eq!(dated, long_ago);
        assert!(
            !std::fs::symlink_metadata(&link).expect("it is there").is_symlink()
                && !temporary.exists()
        );

        std::fs::remove_file(&link).expect("removed");
        std::os::unix::fs::symlink(&missing, &link).expect("linked");
        touch(&link).expect("touched");
        assert!(!missing.exists(), "nothing is made through a link");
    }

    #[tokio::test]
    async fn a_blocked_loop_writes_no_heartbeat() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("heartbeat");
        let heartbeat = Heartbeat::new(Some(&file)).expect("it can be written");
        let touched =
            || std::fs::metadata(&file).and_then(|file| file.modified()).expect("it is there");
        let first = touched();
        let blocks = async { std::thread::sleep(2 * HEARTBEAT_INTERVAL) };
        tokio::select! {
            biased;
            () = blocks => {}
            never = heartbeat.run() => match never {},
        }
        assert_eq!(touched(), first);
        let waits = tokio::time::sleep(2 * HEARTBEAT_INTERVAL);
        tokio::select! {
            () = waits => {}
            never = heartbeat.run() => match never {},
        }
        assert!(touched() > first);
        drop(heartbeat);
        assert!(!file.exists(), "whoever has ended is not well");
    }
}
