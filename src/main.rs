//! The shipped binary: no projectors of its own, only those of the files that `--projectors` names.

use std::process::ExitCode;

fn main() -> ExitCode {
    projectionist::run(projectionist::Registry::new())
}
