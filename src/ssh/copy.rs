//! Files and folders to and from a pod, over one command in it: `cat` for a file, `tar` for a folder. Nothing but a
//! shell is asked of the pod, so images without SFTP do.
//!
//! A file is there whole or not at all, on either side. What a pod sends is written below the named folder only.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tar::EntryType;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio_util::io::SyncIoBridge;

use super::run::keep_head;
use super::{Cause, Session, Ssh, Target, quoted};

const MOST_STDERR: usize = 4096;
/// A start file of the pod's shell may say something first, but not for ever.
const MOST_BEFORE_HEADER: u64 = 64 * 1024;
const BUFFER: usize = 64 * 1024;
/// The exit code by which our scripts tell that there is no such file.
const NOT_FOUND: i32 = 44;
/// Words: where to, the name if that is a folder, how many bytes come, the mode. A connection that is lost looks to
/// `cat` like the end of the file, so the bytes are counted. Nor may it end the shell, which has half a file to remove.
const RECEIVE_FILE: &str = r#"
to=$1
if [ -d "$to" ]; then to=${to%/}/$2; fi
new=$to.autopod-$$
trap '' HUP PIPE
trap 'rm -f -- "$new"' EXIT
cat >"$new" || exit 1
came=$(($(wc -c <"$new")))
if [ "$came" -ne "$3" ]; then echo "$came of $3 bytes came" >&2; exit 1; fi
chmod "$4" "$new" && mv -f -- "$new" "$to"
"#;
const RECEIVE_FOLDER: &str = r#"
to=$1
if [ -d "$to" ]; then to=${to%/}/$2; fi
mkdir -p -- "$to" && exec tar -xof - -C "$to"
"#;
const SEND: &str = r#"
if [ -d "$1" ]; then
	echo AUTOPOD_FOLDER && exec tar -cf - -C "$1" .
elif [ -f "$1" ]; then
	mode=644
	if [ -x "$1" ]; then mode=755; fi
	size=$(wc -c <"$1") && echo "AUTOPOD_FILE $((size)) $mode" && exec cat -- "$1"
elif [ -e "$1" ]; then
	echo "$1 is neither a file nor a folder" >&2
	exit 1
else
	echo "there is no $1" >&2
	exit 44
fi
"#;

#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error(transparent)]
    Ssh(#[from] Cause),
    #[error("{} can't be {doing}", path.display())]
    Local { path: PathBuf, doing: &'static str, source: std::io::Error },
    #[error("{} is neither a file nor a folder", .0.display())]
    NoFile(PathBuf),
    /// In the pod.
    #[error("in the pod: {0}")]
    NotFound(String),
    #[error("in the pod: {0}")]
    Pod(String),
    #[error("the pod sent `{0}`, which would not lie below the folder that it is copied to, or is no plain file")]
    Unsafe(String),
    #[error("the pod did not send all of it")]
    Cut,
}

fn local(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> CopyError {
    move |source| CopyError::Local { path: path.to_owned(), doing, source }
}

impl Ssh {
    /// Copies a file or a folder of this machine into the pod; into `to` if that is a folder there.
    pub async fn send(&self, target: &Target, from: &Path, to: &str) -> Result<(), CopyError> {
        let whole = std::fs::canonicalize(from).map_err(local(from, "read"))?;
        let name = whole.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let to = as_path(to);
        if whole.is_dir() {
            let (pipe, far_end) = std::io::pipe().map_err(local(from, "read"))?;
            let command = script(RECEIVE_FOLDER, &[&to, &name]);
            let session = self.session(target, &command, pipe.into(), Stdio::null(), Stdio::piped())?;
            let packing = tokio::task::spawn_blocking(move || pack(&whole, far_end));
            let (packed, ended) = tokio::join!(packing, success(session));
            packed.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
            return ended;
        }
        let about = std::fs::metadata(&whole).map_err(local(from, "read"))?;
        if !about.is_file() {
            // A pipe has no size by which its end is known.
            return Err(CopyError::NoFile(whole));
        }
        let mode = format!("{:o}", about.permissions().mode() & 0o777);
        let command = script(RECEIVE_FILE, &[&to, &name, &about.len().to_string(), &mode]);
        let file = File::open(&whole).map_err(local(from, "read"))?;
        success(self.session(target, &command, file.into(), Stdio::null(), Stdio::piped())?).await
    }

    /// Copies a file or a folder of the pod to this machine; into `to` if that is a folder. Where it was written.
    pub async fn fetch(&self, target: &Target, from: &str, to: &Path) -> Result<PathBuf, CopyError> {
        let name = match from.trim_end_matches('/').rsplit('/').next() {
            Some("" | "." | "..") | None => None,
            name => name,
        };
        let to = match name {
            Some(name) if to.is_dir() => to.join(name),
            _ => to.to_owned(),
        };
        let command = script(SEND, &[&as_path(from)]);
        let mut session = self.session(target, &command, Stdio::null(), Stdio::piped(), Stdio::piped())?;
        let Some(stdout) = session.child.stdout.take() else { return Err(CopyError::Cut) };
        let stream = BufReader::with_capacity(BUFFER, stdout);
        let (received, ended) = tokio::join!(receive(stream, &to), success(session));
        match received {
            // Why it was cut is known by how the command ended.
            Err(CopyError::Cut) => Err(ended.err().unwrap_or(CopyError::Cut)),
            Err(error) => Err(error),
            Ok(received) => {
                ended?;
                if let Received::File(file) = received {
                    file.persist(&to).map_err(|error| local(&to, "written")(error.error))?;
                }
                Ok(to)
            }
        }
    }
}

enum Received {
    /// Beside its place, to which it is moved when the pod said that this was all.
    File(tempfile::NamedTempFile),
    Folder,
}

async fn receive(mut stream: impl AsyncBufRead + Unpin + Send + 'static, to: &Path) -> Result<Received, CopyError> {
    match header(&mut stream).await? {
        Header::Folder => {
            let to = to.to_owned();
            let unpacking = tokio::task::spawn_blocking(move || unpack(SyncIoBridge::new(stream), &to));
            unpacking.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
            Ok(Received::Folder)
        }
        Header::File { size, mode } => {
            let folder = match to.parent() {
                Some(folder) if folder != Path::new("") => folder,
                _ => Path::new("."),
            };
            let file = tempfile::Builder::new()
                .prefix(".autopod-")
                // What the user's umask leaves of it.
                .permissions(std::fs::Permissions::from_mode(mode))
                .tempfile_in(folder)
                .map_err(local(to, "written"))?;
            let mut writer = tokio::fs::File::from_std(file.as_file().try_clone().map_err(local(to, "written"))?);
            // One byte more would tell that it grew.
            let written = tokio::io::copy_buf(&mut stream.take(size + 1), &mut writer).await;
            let written = written.map_err(local(to, "written"))?;
            writer.flush().await.map_err(local(to, "written"))?;
            if written == size { Ok(Received::File(file)) } else { Err(CopyError::Cut) }
        }
    }
}

enum Header {
    File { size: u64, mode: u32 },
    Folder,
}

async fn header(stream: &mut (impl AsyncBufRead + Unpin)) -> Result<Header, CopyError> {
    let mut start = stream.take(MOST_BEFORE_HEADER);
    loop {
        let mut line = Vec::new();
        // A stream that breaks is one that ends.
        if !matches!(start.read_until(b'\n', &mut line).await, Ok(1..)) {
            return Err(CopyError::Cut);
        }
        let line = String::from_utf8_lossy(&line);
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some("AUTOPOD_FOLDER"), None, None) => return Ok(Header::Folder),
            (Some("AUTOPOD_FILE"), Some(size), Some(mode)) => {
                let (Ok(size), Ok(mode)) = (size.parse(), u32::from_str_radix(mode, 8)) else {
                    return Err(CopyError::Cut);
                };
                return Ok(Header::File { size, mode: mode & 0o777 });
            }
            _ => {}
        }
    }
}

fn pack(folder: &Path, stream: std::io::PipeWriter) -> Result<(), CopyError> {
    let mut archive = tar::Builder::new(std::io::BufWriter::with_capacity(BUFFER, stream));
    archive.follow_symlinks(false);
    let packed =
        archive.append_dir_all(".", folder).and_then(|()| archive.into_inner()?.into_inner().map_err(Into::into));
    match packed {
        // The far end has ended, and how it did says why.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        packed => packed.map(drop).map_err(local(folder, "read")),
    }
}

/// Unpacks plain files, folders and links, each below the folder also when followed through links that came before.
fn unpack(stream: impl Read, to: &Path) -> Result<(), CopyError> {
    std::fs::create_dir_all(to).map_err(local(to, "made"))?;
    let mut archive = tar::Archive::new(stream);
    archive.set_unpack_xattrs(false);
    let mut folders = Vec::new();
    for entry in archive.entries().map_err(|_| CopyError::Cut)? {
        let mut entry = entry.map_err(|_| CopyError::Cut)?;
        match entry.header().entry_type() {
            // Last, for their modes may forbid writing into them.
            EntryType::Directory => folders.push(entry),
            EntryType::Regular
            | EntryType::Continuous
            | EntryType::GNUSparse
            | EntryType::Symlink
            | EntryType::Link => {
                unpack_one(&mut entry, to)?;
            }
            _ => return Err(CopyError::Unsafe(name_of(&entry))),
        }
    }
    folders.iter_mut().rev().try_for_each(|folder| unpack_one(folder, to))
}

fn unpack_one<R: Read>(entry: &mut tar::Entry<'_, R>, to: &Path) -> Result<(), CopyError> {
    let outside = || CopyError::Unsafe(name_of(entry));
    let path = entry.path().map_err(|_| outside())?.into_owned();
    if path.is_absolute() {
        return Err(outside());
    }
    match entry.unpack_in(to) {
        Ok(true) => Ok(()),
        Ok(false) => Err(CopyError::Unsafe(name_of(entry))),
        Err(error) => Err(local(&to.join(path), "written")(error)),
    }
}

fn name_of<R: Read>(entry: &tar::Entry<'_, R>) -> String {
    String::from_utf8_lossy(&entry.path_bytes()).into_owned()
}

/// Waits for a command that must end with success; what it said otherwise.
async fn success(mut session: Session) -> Result<(), CopyError> {
    let (said, _) = keep_head(session.child.stderr.take(), MOST_STDERR).await;
    let code = session.ended().await?;
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    match code {
        0 => Ok(()),
        NOT_FOUND => Err(CopyError::NotFound(said)),
        code if said.is_empty() => Err(CopyError::Pod(format!("the command ended with exit code {code}"))),
        _ => Err(CopyError::Pod(said)),
    }
}

fn script(text: &str, words: &[&str]) -> String {
    let words: Vec<_> = words.iter().map(|word| quoted(word)).collect();
    format!("exec sh -c {} autopod-cp {}", quoted(text), words.join(" "))
}

/// A path that no program takes for an option.
fn as_path(path: &str) -> String {
    if path.starts_with('-') { format!("./{path}") } else { path.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            let mut header = tar::Header::new_gnu();
            // The builder itself would refuse such names.
            header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            let is_link = matches!(kind, EntryType::Symlink | EntryType::Link);
            if is_link {
                header.set_link_name_literal(content).expect("a link");
            }
            let content = if is_link { "" } else { content };
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, content.as_bytes()).expect("an entry");
        }
        builder.into_inner().expect("an archive")
    }

    #[test]
    fn nothing_is_written_outside_the_folder() {
        let folder = tempfile::tempdir().expect("a folder");
        let outside = folder.path().join("outside");
        std::fs::create_dir(&outside).expect("a folder");
        std::fs::write(outside.join("secret"), "secret").expect("a file");
        let elsewhere = outside.to_str().expect("a plain path");
        let absolute = format!("{elsewhere}/evil");
        let cases: [&[(&str, EntryType, &str)]; 6] = [
            &[("../outside/evil", EntryType::Regular, "x")],
            &[("a/../../outside/evil", EntryType::Regular, "x")],
            &[(&absolute, EntryType::Regular, "x")],
            &[("link", EntryType::Symlink, elsewhere), ("link/evil", EntryType::Regular, "x")],
            &[("evil", EntryType::Fifo, "")],
            &[("hard", EntryType::Link, "../outside/secret"), ("hard", EntryType::Regular, "x")],
        ];
        for (number, entries) in cases.iter().enumerate() {
            let to = folder.path().join(format!("to{number}"));
            let error = unpack(archive(entries).as_slice(), &to).expect_err("it is refused");
            assert!(matches!(error, CopyError::Unsafe(_) | CopyError::Local { .. }), "{number}: {error:?}");
            let names: Vec<_> =
                std::fs::read_dir(&outside).expect("a folder").flatten().map(|e| e.file_name()).collect();
            assert_eq!(names, ["secret"], "case {number}");
        }
        assert_eq!(std::fs::read_to_string(outside.join("secret")).expect("a file"), "secret");
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let folder = tempfile::tempdir().expect("a folder");
        let from = folder.path().join("from");
        std::fs::create_dir_all(from.join("closed/deep")).expect("folders");
        std::fs::write(from.join("closed/a 'b'\nc"), "text").expect("a file");
        std::os::unix::fs::symlink("closed", from.join("link")).expect("a link");
        std::fs::set_permissions(from.join("closed"), std::fs::Permissions::from_mode(0o555)).expect("a mode");
        let (mut reader, writer) = std::io::pipe().expect("a pipe");
        let packing = std::thread::spawn(move || pack(&from, writer));
        let to = folder.path().join("to");
        unpack(&mut reader, &to).expect("unpacked");
        packing.join().expect("a thread").expect("packed");
        assert_eq!(std::fs::read_to_string(to.join("link/a 'b'\nc")).expect("a file"), "text");
        assert!(to.join("closed/deep").is_dir());
        for closed in ["from/closed", "to/closed"] {
            let open = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(folder.path().join(closed), open).expect("a mode");
        }
    }

    #[test]
    fn an_archive_that_ends_early_is_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let whole = archive(&[("a", EntryType::Regular, &"x".repeat(2000))]);
        assert!(unpack(&whole[..1000], folder.path()).is_err());
    }
}
