//! A folder of projector files, for `--projectors`.

use std::path::Path;

use tempfile::TempDir;

/// A temporary folder that is deleted when dropped.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(TempDir::new().expect("the folder is created"))
    }

    /// Adds a file.
    pub fn with(self, file: &str, text: &str) -> Self {
        self.write(file, text);
        self
    }

    /// Writes a file, replacing a file of the same name.
    pub fn write(&self, file: &str, text: &str) {
        std::fs::write(self.0.path().join(file), text).expect("the file is written");
    }

    /// The folder's path, for a command line.
    pub fn path(&self) -> &str {
        self.as_path().to_str().expect("the path is UTF-8")
    }

    /// The path of a file in the folder, for a command line.
    pub fn file(&self, name: &str) -> String {
        self.as_path().join(name).to_str().expect("the path is UTF-8").to_owned()
    }

    fn as_path(&self) -> &Path {
        self.0.path()
    }
}
