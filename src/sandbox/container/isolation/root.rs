//! What a pod's own processes see as their root: the container's disk, with the machine's programs lent to it read-only
//! and the volume at its path.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

/// The machine's folders that a pod needs to run programs.
const LENT: &[&str] = &["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc"];
const DEVICES: &[&str] = &["null", "zero", "full", "random", "urandom", "tty"];
const OWN_FOLDERS: &[&str] = &["dev/shm", "home", "mnt", "proc", "root", "run", "var/tmp", "workspace"];

/// A disk that is ready to become a root.
pub struct Root {
    /// What is to be mounted on it, in the format of fstab(5).
    pub fstab: String,
    /// The machine's mounts below the lent folders; they have to be made read-only one by one.
    pub mounts_below: Vec<PathBuf>,
}

impl Root {
    /// Makes the mount points on the disk. `volume` is its folder on this machine and its path in the pod.
    pub fn prepare(disk: &Path, volume: Option<&(PathBuf, String)>) -> io::Result<Root> {
        let mut root = Root { fstab: String::new(), mounts_below: Vec::new() };
        for folder in OWN_FOLDERS {
            fs::create_dir_all(disk.join(folder))?;
        }
        fs::create_dir_all(disk.join("tmp"))?;
        fs::set_permissions(disk.join("tmp"), Permissions::from_mode(0o1777))?;
        if let Some((host_folder, path)) = volume {
            let mount_point = disk.join(inside(path)?);
            fs::create_dir_all(&mount_point)?;
            root.mount(host_folder, &mount_point, "rbind");
        }
        for folder in LENT {
            root.lend(disk, Path::new(folder))?;
        }
        for device in DEVICES {
            let (there, here) = (Path::new("/dev").join(device), disk.join("dev").join(device));
            if there.exists() {
                fs::write(&here, "")?;
                root.mount(&there, &here, "bind");
            }
        }
        for (name, target) in [
            ("fd", "/proc/self/fd"),
            ("stdin", "/proc/self/fd/0"),
            ("stdout", "/proc/self/fd/1"),
            ("stderr", "/proc/self/fd/2"),
        ] {
            symlink(target, disk.join("dev").join(name))?;
        }
        root.fstab.push_str(&format!("proc {} proc nosuid,nodev,noexec 0 0\n", escaped(&disk.join("proc"))));
        let lent: Vec<&str> = LENT.iter().copied().filter(|folder| !Path::new(folder).is_symlink()).collect();
        let mounts = fs::read("/proc/self/mountinfo")?;
        root.mounts_below = mount_points(&mounts);
        root.mounts_below
            .retain(|path| lent.iter().any(|folder| path != Path::new(folder) && path.starts_with(folder)));
        Ok(root)
    }

    /// On most machines `/bin` and its like are links into `/usr`.
    fn lend(&mut self, disk: &Path, folder: &Path) -> io::Result<()> {
        let here = disk.join(folder.strip_prefix("/").unwrap_or(folder));
        match fs::symlink_metadata(folder) {
            Ok(there) if there.is_symlink() => symlink(fs::read_link(folder)?, here),
            Ok(_) => {
                fs::create_dir_all(&here)?;
                self.mount(folder, &here, "rbind,ro,nosuid,nodev");
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn mount(&mut self, there: &Path, here: &Path, options: &str) {
        self.fstab.push_str(&format!("{} {} none {options} 0 0\n", escaped(there), escaped(here)));
    }
}

/// The volume's path without its leading slash; one that leads out of the disk is refused.
fn inside(path: &str) -> io::Result<PathBuf> {
    let parts: Vec<Component<'_>> = Path::new(path).components().filter(|part| *part != Component::RootDir).collect();
    if parts.is_empty() || !parts.iter().all(|part| matches!(part, Component::Normal(_))) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("nothing can be mounted at {path:?}")));
    }
    Ok(parts.iter().collect())
}

/// As fstab(5) wants blanks in paths. What isn't UTF-8 is replaced, so that mounting fails instead of going elsewhere.
fn escaped(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011").replace('\n', "\\012")
}

/// The fifth field of each line of `/proc/self/mountinfo`, with its octal escapes undone.
fn mount_points(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let fields = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    fields.map(|field| PathBuf::from(std::ffi::OsStr::from_bytes(&unescaped(field)))).collect()
}

fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).filter(|_| *first == b'\\');
        let code = octal.and_then(|octal| u8::from_str_radix(std::str::from_utf8(octal).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_survive_both_ways() {
        let odd = "/a b\\c\td";
        assert_eq!(unescaped(escaped(Path::new(odd)).as_bytes()), odd.as_bytes());
        let info = b"36 35 98:0 /m /mnt\\0401 rw - ext3 /dev/root rw\n37 36 0:1 / / rw - x y z\n";
        assert_eq!(mount_points(info), [PathBuf::from("/mnt 1"), PathBuf::from("/")]);
    }

    #[test]
    fn a_volume_stays_on_the_disk() {
        assert_eq!(inside("/workspace/models").expect("a path"), PathBuf::from("workspace/models"));
        for out in ["/", "", "/../etc", "/a/../../b"] {
            inside(out).expect_err(out);
        }
    }
}
