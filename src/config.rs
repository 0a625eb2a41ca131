//! The home folder and the config file.

mod edit;
mod fields;
mod limits;
mod settings;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::state::{self, StateError};

pub use edit::{Change, change};
pub use fields::{API_KEY, Field, all as all_fields, unknown as unknown_fields};
pub use limits::Limits;
pub use settings::{Access, Config, read_object};

/// The folder that holds all state, and the names of what lies in it.
#[derive(Debug, Clone)]
pub struct Home {
    root: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("neither AUTOPOD_HOME nor HOME is set, so there is no place for state")]
    NoHome,
    #[error("AUTOPOD_HOME must be an absolute path, not `{}`", .0.display())]
    Relative(PathBuf),
    #[error("the home `{}` is on a network file system ({kind}), where locks can't be trusted; point AUTOPOD_HOME to a local folder", path.display())]
    NetworkFileSystem { path: PathBuf, kind: &'static str },
    #[error("{} is readable by others (mode {mode:o}) and may hold a key; close it with: chmod 600 '{}'", path.display(), path.display())]
    Open { path: PathBuf, mode: u32 },
    #[error("{} can't be read: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{}: `{field}` is {found}, but must be {expected}", path.display())]
    Field { path: PathBuf, field: &'static str, found: String, expected: &'static str },
    #[error("`{field}` can't be `{found}`; it must be {expected}")]
    Value { field: &'static str, found: String, expected: &'static str },
    #[error("{}: {reason}", path.display())]
    Limits { path: PathBuf, reason: String },
    #[error("the home can't be used")]
    State(#[from] StateError),
}

impl Home {
    /// Creates the folder, closed to others, and refuses file systems whose locks may hang.
    pub fn open(root: PathBuf) -> Result<Self, ConfigError> {
        if !root.is_absolute() {
            return Err(ConfigError::Relative(root));
        }
        state::make_private_folder(&root)?;
        // A linked home is one home, whichever way it is named.
        let root = root.canonicalize().unwrap_or(root);
        close_to_others(&root)?;
        if let Some(kind) = network_file_system(&root) {
            return Err(ConfigError::NetworkFileSystem { path: root, kind });
        }
        Ok(Self { root })
    }

    /// To look into only: nothing is made, mended or refused.
    pub fn unopened(root: PathBuf) -> Self {
        Self { root }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }
    pub fn config_file(&self) -> PathBuf {
        self.root.join("config.json")
    }
    pub fn home_file(&self) -> PathBuf {
        self.root.join("home.json")
    }
    pub fn pods_file(&self) -> PathBuf {
        self.root.join("pods.json")
    }
    pub fn tunnels_file(&self) -> PathBuf {
        self.root.join("tunnels.json")
    }
    pub fn volumes_file(&self) -> PathBuf {
        self.root.join("volumes.json")
    }
    pub fn audit_file(&self) -> PathBuf {
        self.root.join("audit.jsonl")
    }
    pub fn keeper_file(&self) -> PathBuf {
        self.root.join("keeper.json")
    }
    pub fn rate_limit_file(&self) -> PathBuf {
        self.root.join("rate-limit.json")
    }
    pub fn lock(&self, name: &str) -> PathBuf {
        self.root.join("locks").join(name)
    }
    pub fn jobs(&self) -> PathBuf {
        self.root.join("jobs")
    }
    pub fn outputs(&self) -> PathBuf {
        self.root.join("outputs")
    }
    pub fn logs(&self) -> PathBuf {
        self.root.join("logs")
    }
    pub fn ssh(&self) -> PathBuf {
        self.root.join("ssh")
    }
    /// The home that `--sandbox` uses: inside this one, unless this one is a sandbox's already.
    pub fn sandbox(&self) -> PathBuf {
        if self.lock("sandbox").exists() { self.root.clone() } else { self.root.join("sandbox") }
    }
}

/// A folder that was there before may be open to others, and our key goes over a socket in it.
fn close_to_others(root: &Path) -> Result<(), ConfigError> {
    let failed = |error: std::io::Error| ConfigError::Unreadable { path: root.to_owned(), reason: error.to_string() };
    let mode = std::fs::metadata(root).map_err(failed)?.permissions().mode();
    if mode & 0o077 != 0 {
        std::fs::set_permissions(root, std::fs::Permissions::from_mode(mode & 0o700)).map_err(failed)?;
    }
    Ok(())
}

/// The kind of network file system that this lies on, if it does.
#[cfg(target_os = "linux")]
pub fn network_file_system(path: &Path) -> Option<&'static str> {
    // The magic numbers of statfs(2).
    match rustix::fs::statfs(path).ok()?.f_type as u32 {
        0x6969 => Some("nfs"),
        0xff53_4d42 => Some("cifs"),
        0xfe53_4d42 => Some("smb2"),
        0x517b => Some("smb"),
        0x0102_1997 => Some("9p"),
        0x6573_5546 => Some("fuse"),
        _ => None,
    }
}

#[cfg(not(target_os = "linux"))]
pub fn network_file_system(_path: &Path) -> Option<&'static str> {
    None
}

/// A file with a secret must be closed to group and others.
pub fn refuse_open_file(path: &Path) -> Result<(), ConfigError> {
    let unreadable =
        |error: std::io::Error| ConfigError::Unreadable { path: path.to_owned(), reason: error.to_string() };
    let mode = std::fs::metadata(path).map_err(unreadable)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(ConfigError::Open { path: path.to_owned(), mode });
    }
    Ok(())
}
