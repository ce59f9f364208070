//! Releases: sets of projector files. Each deploy brings a new projector. It fixes the fragile
//! projector, or leaves it as it is.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

const TALLY: &str = include_str!("projectors/tally.toml");
const COUNTERS: &str = include_str!("projectors/counters.toml");
const FRAGILE: &str = include_str!("projectors/fragile.toml");
const HOSTILE: &str = include_str!("projectors/hostile.toml");
const DROPPED: &str = include_str!("projectors/dropped.toml");
const NEWCOMER: &str = include_str!("projectors/newcomer.toml");

/// A release has this many of the newest projectors, so that its work does not grow with the
/// deploys.
const NEWCOMERS: u32 = 3;

/// The modes of new projectors, in turn. The first release has one projector of each mode.
const MODES: [&str; 3] = ["from_now", "once", "from_beginning"];

/// A folder of projector files.
#[derive(Debug, Clone)]
pub struct Release {
    pub name: String,
    pub folder: PathBuf,
    newest: u32,
}

impl Release {
    /// Writes the files of a release. The first release has the number 3, and the newcomers 1 to 3.
    pub fn write(releases: &Path, newest: u32, is_fixed: bool) -> anyhow::Result<Self> {
        let name = format!("release-{newest}{}", if is_fixed { "-fixed" } else { "" });
        let folder = releases.join(&name);
        fs::create_dir_all(&folder)?;
        let fragile = if is_fixed {
            FRAGILE.replace(":payload.amount)", ":payload.amount?)")
        } else {
            FRAGILE.into()
        };
        let hostile =
            if is_fixed { HOSTILE.replace(":payload.harm?)", "null)") } else { HOSTILE.into() };
        let mut files = vec![
            ("tally".to_owned(), TALLY.to_owned()),
            ("counters".into(), COUNTERS.into()),
            ("fragile".into(), fragile),
            ("hostile".into(), hostile),
            ("dropped".into(), DROPPED.into()),
        ];
        for number in newest.saturating_sub(NEWCOMERS) + 1..=newest {
            let name = newcomer(number);
            files.push((
                name.clone(),
                NEWCOMER
                    .replace("NAME", &name)
                    .replace("MODE", mode(number))
                    .replace("RELEASE", &newest.to_string()),
            ));
        }
        for (name, text) in files {
            fs::write(folder.join(format!("{name}.toml")), text).context("a projector file")?;
        }
        Ok(Release { name, folder, newest })
    }

    /// Writes the first release, with a newcomer of each mode.
    pub fn first(releases: &Path) -> anyhow::Result<Self> {
        Self::write(releases, NEWCOMERS, false)
    }

    /// Writes the next release, with one more newcomer.
    pub fn next(&self, releases: &Path, is_fixed: bool) -> anyhow::Result<Self> {
        Self::write(releases, self.newest + 1, is_fixed)
    }

    /// Writes the same release, with the fragile and the hostile projector fixed.
    pub fn fixed(&self, releases: &Path) -> anyhow::Result<Self> {
        Self::write(releases, self.newest, true)
    }

    /// Writes the same release, in which the fragile projector subscribes to more event types.
    pub fn widened(&self, releases: &Path) -> anyhow::Result<Self> {
        let name = format!("{}-widened", self.name);
        let folder = releases.join(&name);
        fs::create_dir_all(&folder)?;
        for file in fs::read_dir(&self.folder)? {
            let file = file?;
            let text = fs::read_to_string(file.path())?
                .replace("[\"Amended\"]", "[\"Amended\", \"Closed\"]");
            fs::write(folder.join(file.file_name()), text).context("a projector file")?;
        }
        Ok(Release { name, folder, newest: self.newest })
    }

    /// The names of its projectors, which are the names of its files.
    pub fn projectors(&self) -> anyhow::Result<Vec<String>> {
        let name = |entry: fs::DirEntry| {
            entry.path().file_stem().map(|stem| stem.to_string_lossy().into_owned())
        };
        Ok(fs::read_dir(&self.folder)?.filter_map(|entry| name(entry.ok()?)).collect())
    }

    /// The newcomers of older releases that this release does not have.
    pub fn removed_projectors(&self) -> impl Iterator<Item = String> {
        (1..=self.newest.saturating_sub(NEWCOMERS)).map(newcomer)
    }

    pub fn is_newer_than(&self, other: &Release) -> bool {
        self.newest > other.newest
    }

    /// The folder, as an argument of a command.
    pub fn path(&self) -> &str {
        self.folder.to_str().expect("the path is UTF-8")
    }
}

fn newcomer(number: u32) -> String {
    format!("newcomer_{number}")
}

fn mode(number: u32) -> &'static str {
    MODES[number as usize % MODES.len()]
}
