//! Projectors in other languages: a process applies the events, in its own transaction.

mod conformance;
mod examples;
mod faults;
mod processes;

use std::process::Command;

use crate::support::{Folder, World};

/// Whether a program of another language can be used. Without it, a test is skipped loudly on a
/// developer's machine, and fails where `CI` is set.
fn has_toolchain(program: &str, arguments: &[&str]) -> bool {
    let found = Command::new(program)
        .args(arguments)
        .env("PATH", handlers_path())
        .output()
        .is_ok_and(|output| output.status.success());
    let what = format!("{program} {}", arguments.join(" "));
    assert!(found || std::env::var_os("CI").is_none(), "`{what}` fails: run localstack/handlers");
    if !found {
        eprintln!("SKIPPED, nothing was tested: `{what}` fails. Run localstack/handlers");
    }
    found
}

/// The `PATH` with the Python that `localstack/handlers` has installed packages for.
fn handlers_path() -> String {
    let installed = concat!(env!("CARGO_MANIFEST_DIR"), "/.local/handlers/bin");
    format!("{installed}:{}", std::env::var("PATH").unwrap_or_default())
}

/// Whether PHP has the driver for MySQL.
fn has_php() -> bool {
    has_toolchain("php", &["-r", "exit(extension_loaded('pdo_mysql') ? 0 : 1);"])
}

/// Whether Python has the driver for MySQL.
fn has_python() -> bool {
    has_toolchain("python3", &["-c", "import pymysql"])
}

/// Whether Node has the driver for MySQL.
fn has_typescript() -> bool {
    let driver = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/examples/handlers/typescript/node_modules/mysql2/package.json"
    );
    has_toolchain("node", &["-e", &format!("require('{driver}')")])
}

/// A folder with the projector `simple`, whose handler is a shell script that needs no database.
/// `first` runs at its start, `last` at the end of its input.
fn shell_handler(first: &str, last: &str) -> Folder {
    let script = format!(
        r#"{first}
while read -r line; do
  id=${{line#*\"id\":}} id=${{id%%,*}} id=${{id%%\}}*}}
  case $line in
    *'"type":"hello"'*) echo "{{\"type\":\"hello\",\"id\":$id,\"protocol\":1}}" ;;
    *) echo "{{\"type\":\"done\",\"id\":$id}}" ;;
  esac
done
{last}"#
    );
    let folder = Folder::new().with("handler.sh", &script);
    let (path, out) = (folder.file("handler.sh"), folder.file("out"));
    folder.with(
        "simple.toml",
        &format!(
            "name = 'simple'\nversion = 1\nmode = 'from_beginning'\nevents = ['*']\n\
             delivery = 'at_least_once'\ncommand = ['sh', '{path}']\n\
             pass_environment = ['NAMED']\n[environment]\nOUT = '{out}'\n"
        ),
    )
}

impl World {
    /// A command for the shipped binary with the projector files of a folder.
    fn handler_command(&self, folder: &Folder, arguments: &[&str]) -> tokio::process::Command {
        let mut command = self.command(arguments);
        command
            .env("PATH", handlers_path())
            .env("PROJECTORS", folder.path())
            .env("HANDLER_DATABASE_URL", &self.database_url)
            .env("NAMED", "a value")
            .env("PROJECTIONIST_LOG_FORMAT", "json");
        command
    }
}
