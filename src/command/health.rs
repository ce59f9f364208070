//! The `health` command: checks that a worker's loop still runs, by the file that `play
//! --heartbeat` touches.

use std::convert::Infallible;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use tracing::warn;

use super::print;
use crate::engine::error::Error;

/// How often the file is touched.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
#[command(after_help = "\
For the health check of a container. Exit code 0: the worker's loop runs, or waits for messages \
or for a database that cannot be reached. Exit code 1: the loop has stopped, so the worker should \
be replaced. Lag is not checked: a worker that is behind is healthy.\n\n\
Examples:\n\
\x20 projectionist health --heartbeat /run/projectionist/alive")]
pub(super) struct HealthCommand {
    /// The file that `play --heartbeat` touches
    #[arg(long, value_name = "FILE", env = "PROJECTIONIST_HEARTBEAT")]
    heartbeat: PathBuf,

    /// The highest age of the last heartbeat, in seconds
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
        // A time in the future means that the clock was set back after a recent heartbeat.
        let age = SystemTime::now().duration_since(touched).unwrap_or_default().as_secs();
        if age <= self.max_age {
            print(format!("healthy: the last heartbeat was {age} s ago"))
        } else {
            Err(Error::Unhealthy(format!(
                "the last heartbeat in {file} was {age} s ago: the worker's loop has stopped"
            )))
        }
    }
}

/// The heartbeat of a loop: touches a file while it is polled. The task of the loop must poll it,
/// so that it stops when the task stops or when a handler blocks the task.
pub(super) struct Heartbeat {
    file: Option<PathBuf>,
}

impl Heartbeat {
    /// Writes a first heartbeat, to find out whether the file can be written. Without a file, the
    /// heartbeat does nothing.
    ///
    /// # Errors
    /// [`Error::Input`] if the file cannot be written.
    pub(super) fn new(file: Option<&Path>) -> Result<Self, Error> {
        if let Some(file) = file {
            touch(file).map_err(|error| {
                Error::Input(format!(
                    "the heartbeat cannot be written to {}: {error}; name a writable file, on a \
                    volume if the root file system is read-only",
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
    /// Removes the file: a worker that has ended is not healthy.
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = std::fs::remove_file(file);
        }
    }
}

/// Creates a temporary file beside `file` and renames it to `file`. The rename replaces a symbolic
/// link and does not follow it. In a folder that other users can write to, a link therefore cannot
/// make us touch or create a file elsewhere.
fn touch(file: &Path) -> std::io::Result<()> {
    let mut temporary = file.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let create = || File::options().create_new(true).write(true).open(&temporary);
    match create() {
        // A killed process with our process id left the file, or another user put a link there.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            std::fs::remove_file(&temporary)?;
            create()?
        }
        created => created?,
    };
    std::fs::rename(&temporary, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heartbeat_does_not_follow_symbolic_links() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (target, link) = (folder.path().join("target"), folder.path().join("heartbeat"));
        std::fs::write(&target, "not a heartbeat").expect("the target can be written");
        let long_ago = SystemTime::now() - Duration::from_secs(3600);
        File::options()
            .write(true)
            .open(&target)
            .and_then(|file| file.set_modified(long_ago))
            .expect("the time can be set");
        let temporary = folder.path().join(format!("heartbeat.{}", std::process::id()));
        for place in [&link, &temporary] {
            std::os::unix::fs::symlink(&target, place).expect("the link can be created");
        }
        let missing = folder.path().join("missing");
        touch(&link).expect("the file can be touched");
        let dated =
            std::fs::metadata(&target).and_then(|file| file.modified()).expect("the file exists");
        assert_eq!(dated, long_ago);
        assert!(
            !std::fs::symlink_metadata(&link).expect("the file exists").is_symlink()
                && !temporary.exists()
        );

        std::fs::remove_file(&link).expect("the link can be removed");
        std::os::unix::fs::symlink(&missing, &link).expect("the link can be created");
        touch(&link).expect("the file can be touched");
        assert!(!missing.exists(), "no file is created through a link");
    }

    #[tokio::test]
    async fn a_blocked_loop_writes_no_heartbeat() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let file = folder.path().join("heartbeat");
        let heartbeat = Heartbeat::new(Some(&file)).expect("the file can be written");
        let touched =
            || std::fs::metadata(&file).and_then(|file| file.modified()).expect("the file exists");
        let first = touched();
        let blocking = async { std::thread::sleep(2 * HEARTBEAT_INTERVAL) };
        tokio::select! {
            biased;
            () = blocking => {}
            never = heartbeat.run() => match never {},
        }
        assert_eq!(touched(), first);
        let waiting = tokio::time::sleep(2 * HEARTBEAT_INTERVAL);
        tokio::select! {
            () = waiting => {}
            never = heartbeat.run() => match never {},
        }
        assert!(touched() > first);
        drop(heartbeat);
        assert!(!file.exists(), "a loop that has ended has no heartbeat");
    }
}
