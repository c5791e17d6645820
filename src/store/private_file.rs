//! Creates files that only their owner may read, whole or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Creates `path` with `contents` and mode 0600, durably; `false` if it is there already.
///
/// The file appears under its name only when it is complete, so a process that starts at the same
/// moment never reads half of it. A crash may leave a file with a random suffix beside it.
pub(crate) fn create(path: &Path, contents: &[u8]) -> io::Result<bool> {
    let mut suffix = [0; 8];
    crate::secret::fill_random(&mut suffix);
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", data_encoding::HEXLOWER.encode(&suffix)));
    let draft = PathBuf::from(name);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    let written = file.write_all(contents).and_then(|()| file.sync_all());
    // Closed before it is linked: closing any descriptor of an SQLite file that is in use would drop
    // the locks that this process holds on it.
    drop(file);
    let linked = written.and_then(|()| match fs::hard_link(&draft, path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    });
    let removed = fs::remove_file(&draft);
    let created = linked?;
    removed?;
    File::open(directory_of(path))?.sync_all()?;
    Ok(created)
}

/// The directory that a file is in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether others than owner and group may read the file.
pub(crate) fn is_world_readable(path: &Path) -> bool {
    has_mode(path, 0o004)
}

/// Whether others than owner and group may make files in the directory.
pub(crate) fn is_world_writable(directory: &Path) -> bool {
    has_mode(directory, 0o002)
}

fn has_mode(path: &Path, bit: u32) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & bit != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_private_complete_and_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        assert!(create(&path, b"first").unwrap());
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(!is_world_readable(&path));
        assert!(!create(&path, b"second").unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no drafts stay behind");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(is_world_readable(&path));
        assert!(create(&dir.path().join("absent/key"), b"x").is_err());
    }
}
