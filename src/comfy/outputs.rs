//! What a run put out, brought onto this machine. Every name comes from the server and is untrusted: nothing is ever
//! written outside the folder that was asked for, and nothing that is there is overwritten.

use std::fs::Permissions;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tempfile::NamedTempFile;

use super::error::text;
use super::{Call, ComfyClient, ComfyError};

/// How often a download that broke is started again.
const ATTEMPTS: u32 = 3;
/// How many numbered names are tried when a name is taken.
const MAX_NUMBERED: u32 = 9999;

/// A file that a node put out, as the server names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputFile {
    pub node: String,
    /// The key it stands under: `images`, `gifs`, `audio`, ...
    pub kind: String,
    pub filename: String,
    pub subfolder: String,
    /// The server's folder: `output` or `temp`.
    #[serde(rename = "type")]
    pub folder: String,
}

/// A text that a node put out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputText {
    pub node: String,
    pub text: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outputs {
    pub files: Vec<OutputFile>,
    pub texts: Vec<OutputText>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedFile {
    pub path: PathBuf,
    pub bytes: u64,
    #[serde(flatten)]
    pub source: OutputFile,
}

/// A file that wasn't saved although the server can be reached: asking again won't help.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedFile {
    pub reason: String,
    #[serde(flatten)]
    pub source: OutputFile,
}

/// In bytes.
#[derive(Debug, Clone, Copy)]
pub struct DownloadLimits {
    pub per_file: u64,
    pub total: u64,
}

impl Default for DownloadLimits {
    fn default() -> Self {
        Self { per_file: 16 << 30, total: 64 << 30 }
    }
}

/// Why one file was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// Concerns this file alone; the others may still be saved.
    #[error("{0}")]
    Skip(String),
    #[error(transparent)]
    Comfy(#[from] ComfyError),
}

impl Outputs {
    /// Every item with a `filename` under every key of every node's output, and the strings under `text`.
    pub fn collect(outputs: &Map<String, Value>) -> Self {
        let mut collected = Self::default();
        for (node, output) in outputs {
            for (kind, items) in output.as_object().into_iter().flatten() {
                let items = match items {
                    Value::Array(items) => items.as_slice(),
                    single => std::slice::from_ref(single),
                };
                for item in items {
                    collected.take(node, kind, item);
                }
            }
        }
        collected
    }

    fn take(&mut self, node: &str, kind: &str, item: &Value) {
        if let Some(filename) = item.get("filename").and_then(Value::as_str) {
            let folder = text(item, "type");
            let file = OutputFile {
                node: node.to_owned(),
                kind: kind.to_owned(),
                filename: filename.to_owned(),
                subfolder: text(item, "subfolder"),
                folder: if folder.is_empty() { "output".to_owned() } else { folder },
            };
            // Some nodes list a file under two keys.
            let same = |other: &OutputFile| other.place() == file.place();
            if !self.files.iter().any(same) {
                self.files.push(file);
            }
        } else if let Some(text) = item.as_str().filter(|_| kind == "text") {
            self.texts.push(OutputText { node: node.to_owned(), text: text.to_owned() });
        }
    }
}

impl OutputFile {
    /// What tells files apart on the server.
    pub fn place(&self) -> (&str, &str, &str) {
        (&self.folder, &self.subfolder, &self.filename)
    }

    /// Where it belongs under the folder for outputs, or why its name can't be used.
    fn relative_path(&self) -> Result<PathBuf, String> {
        let mut path = PathBuf::new();
        if !self.subfolder.is_empty() {
            for part in self.subfolder.split('/') {
                path.push(harmless(part)?);
            }
        }
        path.push(harmless(&self.filename)?);
        Ok(path)
    }
}

/// One component of a path that means nothing but itself.
fn harmless(part: &str) -> Result<&str, String> {
    let reason = match part {
        "" => "a part of it is empty, or it starts with `/`",
        "." | ".." => "it leads to another folder",
        _ if part.len() > 255 => "a part of it is longer than 255 bytes",
        _ if part.contains(['/', '\\']) => "it leads to another folder",
        _ if part.chars().any(char::is_control) => "it holds control characters",
        _ => return Ok(part),
    };
    Err(format!("the server's name for it is not safe to use here: {reason}"))
}

/// Downloads `file` to its place under `directory`, which is made if need be: streamed into a temporary file beside
/// it, checked, then moved. A file of the same content that is there already is used as it is; where another one has
/// the name, a number is put in.
pub async fn save(
    client: &ComfyClient,
    file: &OutputFile,
    directory: &Path,
    limit: u64,
) -> Result<SavedFile, SaveError> {
    let relative = file.relative_path().map_err(SaveError::Skip)?;
    let folder = make_folder(directory, relative.parent().unwrap_or(Path::new("")))?;
    let name = relative.file_name().unwrap_or_default();
    let mut attempt = 1;
    let (temporary, bytes) = loop {
        match download(client, file, &folder, limit).await {
            Err(SaveError::Comfy(error)) if error.is_transient() && attempt < ATTEMPTS => {
                tracing::info!(file = file.filename, %error, attempt, "a download broke, starting it again");
                tokio::time::sleep(client.timeouts().poll).await;
                attempt += 1;
            }
            downloaded => break downloaded?,
        }
    };
    let target = folder.join(name);
    let kept = tokio::task::spawn_blocking(move || keep(temporary, &target).map_err(|error| at_path(&target)(error)));
    let path = kept.await.map_err(|error| SaveError::Skip(format!("saving it failed: {error}")))??;
    Ok(SavedFile { path, bytes, source: file.clone() })
}

fn at_path(path: &Path) -> impl FnOnce(std::io::Error) -> ComfyError {
    let path = path.display().to_string();
    move |source| ComfyError::File { path, source }
}

/// Makes the folders one by one and refuses links, so that what is below `directory` in name is also below it on disk.
fn make_folder(directory: &Path, relative: &Path) -> Result<PathBuf, SaveError> {
    std::fs::create_dir_all(directory).map_err(at_path(directory))?;
    let mut folder = directory.canonicalize().map_err(at_path(directory))?;
    for part in relative {
        folder.push(part);
        match std::fs::create_dir(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(at_path(&folder)(error).into());
            }
            _ => {}
        }
        let found = std::fs::symlink_metadata(&folder).map_err(at_path(&folder))?;
        if !found.is_dir() {
            let reason = if found.is_symlink() { "a symbolic link" } else { "a file" };
            return Err(SaveError::Skip(format!("{} is {reason}, not a folder", folder.display())));
        }
    }
    Ok(folder)
}

async fn download(
    client: &ComfyClient,
    file: &OutputFile,
    folder: &Path,
    limit: u64,
) -> Result<(NamedTempFile, u64), SaveError> {
    let (stall, request) = (client.timeouts().stall, client.timeouts().request);
    let query = [("filename", &*file.filename), ("subfolder", &file.subfolder), ("type", &file.folder)];
    let call = Call::new(reqwest::Method::GET, client.url(&["view"], &query), request);
    let name = call.name();
    let late = |after| ComfyError::TimedOut { call: name.clone(), after };
    let response = tokio::time::timeout(request, client.send(call, |request| request));
    let mut response = response.await.map_err(|_| late(request))??;
    let status = response.status().as_u16();
    if status == 404 {
        let reason = "the server doesn't have the file any more (an identical prompt that ran before is not run again, \
                      and its files may have been deleted since: change the seed to run it again)";
        return Err(SaveError::Skip(reason.to_owned()));
    }
    if status != 200 {
        let error = ComfyError::HttpStatus { call: name, status, text: String::new() };
        return Err(if error.is_transient() { error.into() } else { SaveError::Skip(error.to_string()) });
    }
    let too_large = || SaveError::Skip(format!("it is larger than the limit of {limit} bytes"));
    let announced = response.content_length();
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    // As every program makes its files: readable as far as the user's umask lets it.
    let mut builder = tempfile::Builder::new();
    let temporary = builder.prefix(".part-").permissions(Permissions::from_mode(0o666)).tempfile_in(folder);
    let temporary = temporary.map_err(at_path(folder))?;
    let handle = temporary.as_file().try_clone().map_err(at_path(temporary.path()))?;
    let mut writer = tokio::fs::File::from_std(handle);
    let mut bytes = 0;
    loop {
        let chunk = tokio::time::timeout(stall, response.chunk()).await.map_err(|_| late(stall))?;
        let chunk = chunk.map_err(|error| ComfyError::from_reqwest(error, &name, client.address(), stall))?;
        let Some(chunk) = chunk else { break };
        bytes += chunk.len() as u64;
        if bytes > limit {
            return Err(too_large());
        }
        tokio::io::AsyncWriteExt::write_all(&mut writer, &chunk).await.map_err(at_path(temporary.path()))?;
    }
    tokio::io::AsyncWriteExt::flush(&mut writer).await.map_err(at_path(temporary.path()))?;
    writer.sync_all().await.map_err(at_path(temporary.path()))?;
    if let Some(length) = announced.filter(|length| *length != bytes) {
        let source = format!("{bytes} of {length} bytes came").into();
        return Err(ComfyError::Cut { call: name, source }.into());
    }
    Ok((temporary, bytes))
}

/// Gives the file its name without ever replacing one: `x.png`, else `x (1).png`, `x (2).png`, ...
fn keep(mut temporary: NamedTempFile, target: &Path) -> std::io::Result<PathBuf> {
    for number in 0..=MAX_NUMBERED {
        let path = numbered(target, number);
        match temporary.persist_noclobber(&path) {
            Ok(_) => return Ok(path),
            Err(refused) if refused.error.kind() != std::io::ErrorKind::AlreadyExists => return Err(refused.error),
            Err(refused) => temporary = refused.file,
        }
        if same_content(temporary.path(), &path)? {
            return Ok(path);
        }
    }
    Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, "every numbered name is taken as well"))
}

fn numbered(target: &Path, number: u32) -> PathBuf {
    if number == 0 {
        return target.to_owned();
    }
    let part = |part: Option<&std::ffi::OsStr>| part.unwrap_or_default().to_string_lossy().into_owned();
    let extension = match part(target.extension()) {
        extension if extension.is_empty() => extension,
        extension => format!(".{extension}"),
    };
    target.with_file_name(format!("{} ({number}){extension}", part(target.file_stem())))
}

/// `false` for whatever isn't a plain file, links included.
fn same_content(ours: &Path, theirs: &Path) -> std::io::Result<bool> {
    let found = std::fs::symlink_metadata(theirs)?;
    if !found.is_file() || found.len() != std::fs::metadata(ours)?.len() {
        return Ok(false);
    }
    let (ours, theirs) = (std::fs::File::open(ours)?, std::fs::File::open(theirs)?);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    loop {
        a.clear();
        b.clear();
        (&ours).take(1 << 20).read_to_end(&mut a)?;
        (&theirs).take(1 << 20).read_to_end(&mut b)?;
        if a != b || a.is_empty() {
            return Ok(a == b);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn file(subfolder: &str, filename: &str) -> OutputFile {
        let (node, kind, folder) = ("1".to_owned(), "images".to_owned(), "output".to_owned());
        OutputFile { node, kind, filename: filename.to_owned(), subfolder: subfolder.to_owned(), folder }
    }

    #[test]
    fn finds_files_under_every_key() {
        let outputs = json!({
            "9": {"images": [{"filename": "a.png", "subfolder": "t", "type": "output"}], "animated": [true]},
            "10": {"gifs": [{"filename": "b.mp4", "type": "temp", "frame_rate": 8.0}], "text": ["hello", 5]},
            "11": {"3d": {"filename": "c.glb"}, "text": "single"},
            "12": {"again": [{"filename": "c.glb", "subfolder": "", "type": "output"}], "none": null},
        });
        let found = Outputs::collect(outputs.as_object().unwrap());
        let files: Vec<_> = found.files.iter().map(|file| (file.kind.as_str(), file.place())).collect();
        assert_eq!(
            files,
            [("images", ("output", "t", "a.png")), ("gifs", ("temp", "", "b.mp4")), ("3d", ("output", "", "c.glb"))]
        );
        let texts: Vec<_> = found.texts.iter().map(|text| (text.node.as_str(), text.text.as_str())).collect();
        assert_eq!(texts, [("10", "hello"), ("11", "single")]);
    }

    #[test]
    fn refuses_names_that_lead_elsewhere() {
        assert_eq!(file("t/u", "a b.png").relative_path().unwrap(), Path::new("t/u/a b.png"));
        for (subfolder, filename) in [
            ("..", "x"),
            ("a/../..", "x"),
            ("/etc", "x"),
            ("a//b", "x"),
            ("a\\b", "x"),
            ("", ""),
            ("", ".."),
            ("", "../../x"),
            ("", "/etc/x"),
            ("", "a\0b"),
            ("", "a\\b"),
            ("", "a\nb"),
            ("", &"x".repeat(256)),
        ] {
            assert!(file(subfolder, filename).relative_path().is_err(), "{subfolder:?} {filename:?}");
        }
    }

    #[test]
    fn numbers_go_before_the_extension() {
        assert_eq!(numbered(Path::new("/d/x.tar.gz"), 2), Path::new("/d/x.tar (2).gz"));
        assert_eq!(numbered(Path::new("/d/plain"), 1), Path::new("/d/plain (1)"));
    }
}
