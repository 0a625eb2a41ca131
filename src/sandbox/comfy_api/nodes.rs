//! What each node class does.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::Comfy;
use super::files::{Kind, relative};
use super::pictures::{Painting, Picture};
use super::queue::Job;

/// The most pixels that one node may make: 64 megapixels, 192 MB.
const MOST_PIXELS: u64 = 64 << 20;
/// How long the sampler sleeps at most before it looks whether it is to end.
const NAP: Duration = Duration::from_millis(10);
/// A preview is sent this many times during one sampling.
const PREVIEWS: u32 = 4;

/// What a node puts out at one slot.
#[derive(Clone)]
pub enum Output {
    Images(Arc<Vec<Picture>>),
    /// No class of the sandbox takes a mask, so none is kept.
    Mask,
}

/// What a node is given.
pub struct Call<'a> {
    pub comfy: &'a Comfy,
    pub job: &'a Job,
    /// Constant inputs, validated and of the right type.
    pub values: Map<String, Value>,
    /// Linked inputs.
    pub links: Vec<(String, Output)>,
    /// Told `(value, max)` when there is progress.
    pub progress: &'a dyn Fn(u64, u64),
}

/// What a node gives back: its outputs by slot, and what it shows.
pub struct Made {
    pub outputs: Vec<Output>,
    pub shown: Option<Value>,
}

pub enum Failure {
    Interrupted,
    Raised { exception: &'static str, message: String },
}

impl Call<'_> {
    pub fn run(&self, class: &str) -> Result<Made, Failure> {
        match class {
            "EmptyImage" => self.empty_image(),
            "LoadImage" => self.load_image(),
            "ImageInvert" => Ok(made(self.images("image")?.iter().map(Picture::inverted).collect())),
            "ImageScale" => self.scale(),
            "SaveImage" => self.save(Kind::Output, self.text("filename_prefix")?, ""),
            "PreviewImage" => {
                let random = Uuid::new_v4().simple().to_string();
                self.save(Kind::Temp, "ComfyUI", &format!("_temp_{}", &random[..5]))
            }
            "SandboxSampler" => self.sample(),
            other => Err(raised("RuntimeError", format!("{other} has no implementation"))),
        }
    }

    fn empty_image(&self) -> Result<Made, Failure> {
        let (width, height) = self.size()?;
        let (batch, color) = (self.number("batch_size")?, self.number("color")?);
        check_size(width, height, batch)?;
        let color = [(color >> 16) as u8, (color >> 8) as u8, color as u8];
        Ok(made(vec![Picture::filled(width, height, color); batch as usize]))
    }

    fn load_image(&self) -> Result<Made, Failure> {
        let name = self.text("image")?;
        let missing = || raised("FileNotFoundError", format!("[Errno 2] No such file or directory: '{name}'"));
        let path = self.comfy.files.annotated(name).ok_or_else(missing)?;
        let bytes = std::fs::read(path).map_err(|_| missing())?;
        let picture = Picture::decode_png(&bytes, MOST_PIXELS).map_err(|error| {
            raised(
                "PIL.UnidentifiedImageError",
                format!("cannot identify image file '{name}' (only PNG here): {error}"),
            )
        })?;
        Ok(Made { outputs: vec![Output::Images(Arc::new(vec![picture])), Output::Mask], shown: None })
    }

    fn scale(&self) -> Result<Made, Failure> {
        let images = self.images("image")?;
        let (width, height) = self.size()?;
        let bilinear = self.text("upscale_method")? == "bilinear";
        let center = self.text("crop")? == "center";
        let scaled = images.iter().map(|picture| {
            let (width, height) = fill_in_size(picture, width, height);
            check_size(width, height, images.len() as u64)?;
            let cropped = center.then(|| picture.cropped_to_ratio(width, height));
            let source = cropped.as_ref().unwrap_or(picture);
            if bilinear { Ok(source.scaled_bilinear(width, height)) } else { Ok(source.scaled_nearest(width, height)) }
        });
        Ok(made(scaled.collect::<Result<_, _>>()?))
    }

    /// Writes `prefix_00001_.png` and so on, counted up from what is there.
    fn save(&self, kind: Kind, prefix: &str, suffix: &str) -> Result<Made, Failure> {
        let images = self.images("images")?;
        let first = images.first().ok_or_else(|| raised("IndexError", "there is no image".into()))?;
        let prefix = prefix.replace("%width%", &first.width.to_string()).replace("%height%", &first.height.to_string());
        let outside = || {
            let message = "**** ERROR: Saving image outside the output folder is not allowed.";
            raised("Exception", format!("{message}\n filename_prefix: {prefix}"))
        };
        let path = relative(&prefix).ok_or_else(outside)?;
        let parent = path.parent().unwrap_or(Path::new(""));
        let subfolder = parent.to_str().ok_or_else(outside)?;
        let name = format!("{}{suffix}", path.file_name().and_then(|name| name.to_str()).unwrap_or_default());
        let wrong = |error: std::io::Error| raised("OSError", error.to_string());
        let folder = self.comfy.files.writable(kind, subfolder).map_err(wrong)?.ok_or_else(outside)?;
        let mut texts = vec![("prompt", Value::Object(self.job.prompt.clone()).to_string())];
        if let Some(workflow) = self.job.extra_data.get("extra_pnginfo").and_then(|info| info.get("workflow")) {
            texts.push(("workflow", workflow.to_string()));
        }
        let first_number = next_number(&folder, &name).map_err(wrong)?;
        let mut saved = Vec::new();
        for (index, image) in images.iter().enumerate() {
            let name = name.replace("%batch_num%", &index.to_string());
            let file = format!("{name}_{:05}_.png", first_number + index as u64);
            let bytes = image.encode_png(&texts).map_err(|error| raised("OSError", error))?;
            std::fs::write(folder.join(&file), bytes).map_err(wrong)?;
            saved.push(json!({ "filename": file, "subfolder": subfolder, "type": kind.name() }));
        }
        Ok(Made { outputs: Vec::new(), shown: Some(json!({ "images": saved })) })
    }

    fn sample(&self) -> Result<Made, Failure> {
        let (width, height) = self.size()?;
        let (steps, seed) = (self.number("steps")? as u32, self.number("seed")?);
        let pace = Duration::from_millis(self.number("step_ms")?);
        let mut painting = Painting::new(width, height, seed);
        for step in 1..=steps {
            let until = Instant::now() + pace;
            painting.refine(step, steps);
            while let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
                if self.comfy.is_interrupted(self.job) {
                    return Err(Failure::Interrupted);
                }
                std::thread::sleep(left.min(NAP));
            }
            if self.comfy.is_interrupted(self.job) {
                return Err(Failure::Interrupted);
            }
            (self.progress)(step.into(), steps.into());
            if step < steps && step % steps.div_ceil(PREVIEWS) == 0 {
                self.preview(&painting.picture());
            }
        }
        Ok(made(vec![painting.picture()]))
    }

    /// Shows an unfinished picture, at most 256 pixels wide and high.
    fn preview(&self, picture: &Picture) {
        let factor = (256.0 / f64::from(picture.width.max(picture.height))).min(1.0);
        let side = |length: u32| ((f64::from(length) * factor) as u32).max(1);
        if let Ok(png) = picture.scaled_nearest(side(picture.width), side(picture.height)).encode_png(&[]) {
            self.comfy.sockets.send_preview(&png, self.job.client());
        }
    }

    fn images(&self, name: &str) -> Result<&Arc<Vec<Picture>>, Failure> {
        match self.links.iter().find(|(input, _)| input == name) {
            Some((_, Output::Images(images))) => Ok(images),
            _ => Err(raised("TypeError", format!("{name} is not an image"))),
        }
    }

    fn number(&self, name: &str) -> Result<u64, Failure> {
        let number = self.values.get(name).and_then(Value::as_u64);
        number.ok_or_else(|| raised("TypeError", format!("{name} is not a number")))
    }

    fn text(&self, name: &str) -> Result<&str, Failure> {
        let text = self.values.get(name).and_then(Value::as_str);
        text.ok_or_else(|| raised("TypeError", format!("{name} is not a string")))
    }

    /// Validation keeps both within `u32`.
    fn size(&self) -> Result<(u32, u32), Failure> {
        Ok((self.number("width")? as u32, self.number("height")? as u32))
    }
}

fn made(images: Vec<Picture>) -> Made {
    Made { outputs: vec![Output::Images(Arc::new(images))], shown: None }
}

fn raised(exception: &'static str, message: String) -> Failure {
    Failure::Raised { exception, message }
}

/// A GPU would be out of memory; here it is said before anything is allocated.
fn check_size(width: u32, height: u32, batch: u64) -> Result<(), Failure> {
    if u64::from(width) * u64::from(height) * batch > MOST_PIXELS {
        return Err(raised("torch.OutOfMemoryError", "Allocation on device".into()));
    }
    Ok(())
}

/// A side of 0 follows from the other one; both 0 leave the picture as it is.
fn fill_in_size(picture: &Picture, width: u32, height: u32) -> (u32, u32) {
    let follow =
        |side: u32, of: u32, to: u32| ((f64::from(side) * f64::from(to) / f64::from(of)).round() as u32).max(1);
    match (width, height) {
        (0, 0) => (picture.width, picture.height),
        (0, height) => (follow(picture.width, picture.height, height), height),
        (width, 0) => (width, follow(picture.height, picture.width, width)),
        both => both,
    }
}

/// One more than the highest number among `name_00001_.png` and the like.
fn next_number(folder: &Path, name: &str) -> std::io::Result<u64> {
    let mut highest = 0;
    for entry in std::fs::read_dir(folder)? {
        let file = entry?.file_name();
        let number = file.to_str().and_then(|file| file.strip_prefix(name)?.strip_prefix('_')?.split('_').next());
        highest = highest.max(number.and_then(|digits| digits.parse().ok()).unwrap_or(0));
    }
    Ok(highest + 1)
}
