//! Pictures in memory: PNG in and out, scaling, and the sampler's painting.

use std::io::Cursor;

use png::{BitDepth, ColorType, Transformations};

/// An RGB picture, 8 bits a channel, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    pub width: u32,
    pub height: u32,
    pub pixels: Vec<u8>,
}

impl Picture {
    pub fn filled(width: u32, height: u32, color: [u8; 3]) -> Picture {
        Picture { width, height, pixels: color.repeat(width as usize * height as usize) }
    }

    pub fn decode_png(bytes: &[u8], most_pixels: u64) -> Result<Picture, String> {
        let mut decoder = png::Decoder::new(Cursor::new(bytes));
        decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
        let mut reader = decoder.read_info().map_err(|error| error.to_string())?;
        let (width, height) = (reader.info().width, reader.info().height);
        if u64::from(width) * u64::from(height) > most_pixels {
            return Err("the picture is too large".into());
        }
        let size = reader.output_buffer_size().ok_or("the picture is too large")?;
        let mut buffer = vec![0; size];
        let frame = reader.next_frame(&mut buffer).map_err(|error| error.to_string())?;
        buffer.truncate(frame.buffer_size());
        let pixels = match frame.color_type {
            ColorType::Rgb => buffer,
            ColorType::Rgba => buffer.chunks_exact(4).flat_map(|pixel| [pixel[0], pixel[1], pixel[2]]).collect(),
            ColorType::Grayscale => buffer.iter().flat_map(|gray| [*gray; 3]).collect(),
            ColorType::GrayscaleAlpha => buffer.chunks_exact(2).flat_map(|pixel| [pixel[0]; 3]).collect(),
            ColorType::Indexed => return Err("the palette was not expanded".into()),
        };
        Ok(Picture { width, height, pixels })
    }

    /// `texts` become tEXt chunks, as ComfyUI stores the workflow.
    pub fn encode_png(&self, texts: &[(&str, String)]) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, self.width, self.height);
        encoder.set_color(ColorType::Rgb);
        encoder.set_depth(BitDepth::Eight);
        encoder.set_compression(png::Compression::Fast);
        for (keyword, text) in texts {
            let text = ascii_json(text);
            encoder.add_text_chunk((*keyword).to_owned(), text).map_err(|error| error.to_string())?;
        }
        let mut writer = encoder.write_header().map_err(|error| error.to_string())?;
        writer.write_image_data(&self.pixels).map_err(|error| error.to_string())?;
        writer.finish().map_err(|error| error.to_string())?;
        Ok(bytes)
    }

    pub fn inverted(&self) -> Picture {
        Picture { pixels: self.pixels.iter().map(|value| 255 - value).collect(), ..*self }
    }

    /// The middle part that has the sides' ratio of `width` to `height`.
    pub fn cropped_to_ratio(&self, width: u32, height: u32) -> Picture {
        let (old_ratio, new_ratio) =
            (f64::from(self.width) / f64::from(self.height), f64::from(width) / f64::from(height));
        let (mut left, mut top) = (0, 0);
        if old_ratio > new_ratio {
            left = ((f64::from(self.width) - f64::from(self.width) * (new_ratio / old_ratio)) / 2.0).round() as u32;
        } else if old_ratio < new_ratio {
            top = ((f64::from(self.height) - f64::from(self.height) * (old_ratio / new_ratio)) / 2.0).round() as u32;
        }
        let (new_width, new_height) = (self.width - 2 * left, self.height - 2 * top);
        let mut pixels = Vec::with_capacity(new_width as usize * new_height as usize * 3);
        for y in top..top + new_height {
            let start = (y as usize * self.width as usize + left as usize) * 3;
            pixels.extend_from_slice(&self.pixels[start..start + new_width as usize * 3]);
        }
        Picture { width: new_width, height: new_height, pixels }
    }

    /// The pixel whose centre is nearest.
    pub fn scaled_nearest(&self, width: u32, height: u32) -> Picture {
        let column = |x: u32| ((f64::from(x) + 0.5) * f64::from(self.width) / f64::from(width)) as u32;
        let row = |y: u32| ((f64::from(y) + 0.5) * f64::from(self.height) / f64::from(height)) as u32;
        self.sampled(width, height, |x, y| self.at(column(x), row(y)))
    }

    /// Between the four nearest pixels, without smoothing when it gets smaller.
    pub fn scaled_bilinear(&self, width: u32, height: u32) -> Picture {
        let place = |position: u32, new: u32, old: u32| {
            ((f64::from(position) + 0.5) * f64::from(old) / f64::from(new) - 0.5).clamp(0.0, f64::from(old - 1))
        };
        self.sampled(width, height, |x, y| {
            let (fx, fy) = (place(x, width, self.width), place(y, height, self.height));
            let (left, top) = (fx as u32, fy as u32);
            let (right, bottom) = ((left + 1).min(self.width - 1), (top + 1).min(self.height - 1));
            let (over, down) = (fx.fract(), fy.fract());
            let corners = [self.at(left, top), self.at(right, top), self.at(left, bottom), self.at(right, bottom)];
            std::array::from_fn(|channel| {
                let value = |corner: usize| f64::from(corners[corner][channel]);
                let upper = value(0) * (1.0 - over) + value(1) * over;
                let lower = value(2) * (1.0 - over) + value(3) * over;
                (upper * (1.0 - down) + lower * down).round() as u8
            })
        })
    }

    fn sampled(&self, width: u32, height: u32, color: impl Fn(u32, u32) -> [u8; 3]) -> Picture {
        let mut pixels = Vec::with_capacity(width as usize * height as usize * 3);
        for y in 0..height {
            for x in 0..width {
                pixels.extend_from_slice(&color(x, y));
            }
        }
        Picture { width, height, pixels }
    }

    fn at(&self, x: u32, y: u32) -> [u8; 3] {
        let index = (y.min(self.height - 1) as usize * self.width as usize + x.min(self.width - 1) as usize) * 3;
        [self.pixels[index], self.pixels[index + 1], self.pixels[index + 2]]
    }
}

/// tEXt chunks hold Latin-1 only, so what is beyond ASCII is written as JSON escapes.
fn ascii_json(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for unit in json.encode_utf16() {
        match u8::try_from(unit) {
            Ok(byte) if byte.is_ascii() => text.push(char::from(byte)),
            _ => text.push_str(&format!("\\u{unit:04x}")),
        }
    }
    text
}

/// How often the formula is applied to each point of the finished painting.
const ITERATIONS: u32 = 120;

/// A Julia set that a seed chooses. Each step applies its formula some more times, so that the picture gets finer, and
/// the finished one depends on the seed and the size alone.
pub struct Painting {
    width: u32,
    height: u32,
    constant: (f64, f64),
    palette: [f64; 3],
    points: Vec<Point>,
    iterations: u32,
}

#[derive(Clone, Copy)]
struct Point {
    x: f64,
    y: f64,
    /// After how many iterations it escaped, smoothed; None while it has not.
    escaped: Option<f64>,
}

impl Painting {
    pub fn new(width: u32, height: u32, seed: u64) -> Painting {
        let mut random = SplitMix(seed);
        // Just outside of the Mandelbrot set's main cardioid the Julia sets are at their richest.
        let angle = random.fraction() * std::f64::consts::TAU;
        let reach = 1.02 + 0.06 * random.fraction();
        let constant = (
            reach * (angle.cos() / 2.0 - (2.0 * angle).cos() / 4.0),
            reach * (angle.sin() / 2.0 - (2.0 * angle).sin() / 4.0),
        );
        let palette = std::array::from_fn(|_| random.fraction());
        let turn = random.fraction() * std::f64::consts::TAU;
        let scale = 3.0 / f64::from(width.min(height));
        let points = (0..height).flat_map(|y| (0..width).map(move |x| (x, y))).map(|(x, y)| {
            let (x, y) = (
                (f64::from(x) + 0.5 - f64::from(width) / 2.0) * scale,
                (f64::from(y) + 0.5 - f64::from(height) / 2.0) * scale,
            );
            Point { x: x * turn.cos() - y * turn.sin(), y: x * turn.sin() + y * turn.cos(), escaped: None }
        });
        Painting { width, height, constant, palette, points: points.collect(), iterations: 0 }
    }

    /// Goes on to where step `step` of `steps` ends.
    pub fn refine(&mut self, step: u32, steps: u32) {
        let goal = ITERATIONS * step / steps;
        for point in self.points.iter_mut().filter(|point| point.escaped.is_none()) {
            for iteration in self.iterations..goal {
                let size = point.x * point.x + point.y * point.y;
                if size > 256.0 {
                    point.escaped = Some(f64::from(iteration) + 1.0 - (size.ln() / 2.0).log2());
                    break;
                }
                (point.x, point.y) = (
                    point.x * point.x - point.y * point.y + self.constant.0,
                    2.0 * point.x * point.y + self.constant.1,
                );
            }
        }
        self.iterations = goal;
    }

    pub fn picture(&self) -> Picture {
        let pixels = self.points.iter().flat_map(|point| self.color(point)).collect();
        Picture { width: self.width, height: self.height, pixels }
    }

    fn color(&self, point: &Point) -> [u8; 3] {
        let (hue, light) = match point.escaped {
            Some(count) => (0.35 * (count.max(0.0) + 3.0).ln(), 1.0),
            // What never escapes glows faintly from where it ended.
            None => (point.x * point.x + point.y * point.y, 0.3),
        };
        std::array::from_fn(|channel| {
            let wave = ((hue + self.palette[channel] * 0.5 + channel as f64 / 6.0) * std::f64::consts::TAU).cos();
            ((0.5 + 0.5 * wave) * light * 255.0).round() as u8
        })
    }
}

/// The SplitMix64 generator: small, and the same everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// From 0 up to 1.
    fn fraction(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
