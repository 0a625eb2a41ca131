//! The folders of the server. Every name here comes from a client: none of them may lead out of its folder.

use std::io;
use std::path::{Component, Path, PathBuf};

/// The kinds of models that `/models` lists.
pub const MODEL_FOLDERS: &[&str] = &[
    "checkpoints",
    "loras",
    "vae",
    "text_encoders",
    "diffusion_models",
    "clip_vision",
    "style_models",
    "embeddings",
    "controlnet",
    "upscale_models",
];

pub struct Files {
    root: PathBuf,
    volume: Option<PathBuf>,
}

/// One of the three folders that clients may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Input,
    Output,
    Temp,
}

impl Kind {
    pub fn parse(name: &str) -> Option<Kind> {
        [Kind::Input, Kind::Output, Kind::Temp].into_iter().find(|kind| kind.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Kind::Input => "input",
            Kind::Output => "output",
            Kind::Temp => "temp",
        }
    }
}

impl Files {
    pub fn new(root: PathBuf, volume: Option<PathBuf>) -> Files {
        Files { root, volume }
    }

    pub fn folder(&self, kind: Kind) -> PathBuf {
        self.root.join(kind.name())
    }

    /// The names of the files right in the input folder, sorted.
    pub fn input_names(&self) -> Vec<String> {
        file_names(&self.folder(Kind::Input))
    }

    /// The path of an existing file, with symbolic links followed and proven to lie inside its folder.
    pub fn existing(&self, kind: Kind, subfolder: &str, name: &str) -> Option<PathBuf> {
        let folder = self.folder(kind).canonicalize().ok()?;
        let path = folder.join(relative(subfolder)?).join(relative(name)?).canonicalize().ok()?;
        (path.starts_with(&folder) && path.is_file()).then_some(path)
    }

    /// A file for `LoadImage`: in the input folder, or in the one that its name ends with, as in `x.png [output]`.
    pub fn annotated(&self, name: &str) -> Option<PathBuf> {
        let (name, kind) = split_annotation(name);
        self.existing(kind.unwrap_or(Kind::Input), "", name)
    }

    /// Makes a folder for writing and returns its real path. None: it would lie outside.
    pub fn writable(&self, kind: Kind, subfolder: &str) -> io::Result<Option<PathBuf>> {
        let folder = self.folder(kind).canonicalize()?;
        let Some(subfolder) = relative(subfolder) else { return Ok(None) };
        // Made one by one: through a symbolic link that leads out, nothing is to be made at all.
        let mut path = folder.clone();
        for part in subfolder.components() {
            path = path.join(part);
            match std::fs::create_dir(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
            path = path.canonicalize()?;
            if !path.starts_with(&folder) {
                return Ok(None);
            }
        }
        Ok(Some(path))
    }

    /// The model files of one kind on the network volume, sorted.
    pub fn models(&self, kind: &str) -> Vec<String> {
        let Some(volume) = &self.volume else { return Vec::new() };
        let mut names: Vec<String> = ["models", "ComfyUI/models"]
            .iter()
            .flat_map(|models| file_names(&volume.join(models).join(kind)))
            .collect();
        names.sort();
        names.dedup();
        names
    }
}

/// Splits `x.png [output]` into its name and its folder.
pub fn split_annotation(name: &str) -> (&str, Option<Kind>) {
    for kind in [Kind::Input, Kind::Output, Kind::Temp] {
        if let Some(bare) = name.strip_suffix(&format!("[{}]", kind.name())) {
            return (bare.strip_suffix(' ').unwrap_or(bare), Some(kind));
        }
    }
    (name, None)
}

/// A path from a client with its `.` and `..` worked out. None: it is absolute, leads out or can't be a path.
pub fn relative(text: &str) -> Option<PathBuf> {
    if text.contains(['\0', '\\']) {
        return None;
    }
    let mut path = PathBuf::new();
    for part in Path::new(text).components() {
        match part {
            Component::Normal(name) => path.push(name),
            Component::CurDir => {}
            Component::ParentDir => {
                if !path.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(path)
}

fn file_names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let files = entries.flatten().filter(|entry| entry.path().is_file());
    let mut names: Vec<String> = files.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}
