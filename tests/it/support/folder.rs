//! A folder of projector files, as `--projectors` takes one.

use std::path::Path;

use tempfile::TempDir;

/// Gone when dropped.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(TempDir::new().expect("a folder"))
    }

    /// With this file in it.
    pub fn with(self, file: &str, text: &str) -> Self {
        self.write(file, text);
        self
    }

    /// Writes a file, over one of that name.
    pub fn write(&self, file: &str, text: &str) {
        std::fs::write(self.0.path().join(file), text).expect("the file is written");
    }

    /// For a command line.
    pub fn path(&self) -> &str {
        self.as_path().to_str().expect("a name in UTF-8")
    }

    /// The path of a file in it, for a command line.
    pub fn file(&self, name: &str) -> String {
        self.as_path().join(name).to_str().expect("a name in UTF-8").to_owned()
    }

    fn as_path(&self) -> &Path {
        self.0.path()
    }
}
