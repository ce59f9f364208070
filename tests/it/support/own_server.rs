//! A database server that belongs to one test. Only here may a test change a global setting.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::is_mariadb;

/// Added to the default ports. It differs from the offset of `localstack/chaos`, which may run at
/// the same time.
const PORT_OFFSET: &str = "-21000";

/// A server of the kind under test, started by `localstack/up` in its own folder. It is stopped
/// when dropped, also when the test fails.
pub struct OwnServer {
    state: PathBuf,
    /// The URL of the user `root`, without a database.
    pub url: String,
    /// `HOST:PORT`.
    pub address: String,
    /// Held until the server is stopped, because two runs in one checkout use the same folder.
    _lock: File,
}

impl OwnServer {
    pub async fn start() -> Self {
        let kind = if is_mariadb().await { "mariadb" } else { "mysql" };
        let state = Path::new(env!("CARGO_MANIFEST_DIR")).join(".local/settings").join(kind);
        std::fs::create_dir_all(&state).expect("the folder is created");
        let lock = File::create(state.join("lock")).expect("the lock file is created");
        lock.lock().expect("the lock is taken");
        // A killed run may have left its server running, with changed settings.
        localstack("down", &[], &state);
        localstack("up", &[kind], &state);
        let port =
            std::fs::read_to_string(state.join(kind).join("port")).expect("the server has a port");
        let address = format!("127.0.0.1:{}", port.trim());
        OwnServer { state, url: format!("mysql://root@{address}"), address, _lock: lock }
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        localstack("down", &[], &self.state);
    }
}

/// Runs a script of `localstack/` with its state in this folder.
fn localstack(script: &str, arguments: &[&str], state: &Path) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("localstack").join(script);
    let mut command = Command::new(path);
    command
        .args(arguments)
        .env("PROJECTIONIST_STATE", state)
        .env("PROJECTIONIST_PORT_OFFSET", PORT_OFFSET);
    for port in ["MARIADB_PORT", "MYSQL_PORT", "LOCALSTACK_PORT"] {
        command.env_remove(port);
    }
    let ended = command.output().expect("the script starts");
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert!(ended.status.success(), "localstack/{script} failed: {stderr}");
}
