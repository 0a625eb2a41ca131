//! `/upload/image` and `/view`: files in and out.

use std::path::Path;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::multipart::MultipartError;
use axum::extract::{Multipart, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio_util::io::ReaderStream;

use super::Comfy;
use super::files::{Kind, relative, split_annotation};

/// Fields beside the picture are short.
const LONGEST_FIELD: usize = 4096;

#[derive(Default)]
struct Upload {
    image: Option<(String, Bytes)>,
    kind: Option<String>,
    subfolder: String,
    overwrite: bool,
}

/// Answers `{name, subfolder, type}` with the name that the file really got.
pub async fn upload(State(comfy): State<Arc<Comfy>>, multipart: Multipart) -> Response {
    let upload = match read_form(multipart).await {
        Ok(Some(upload)) => upload,
        Ok(None) => return StatusCode::BAD_REQUEST.into_response(),
        Err(error) => return (error.status(), error.body_text()).into_response(),
    };
    let Some((name, bytes)) = upload.image else { return StatusCode::BAD_REQUEST.into_response() };
    let kind = Kind::parse(upload.kind.as_deref().unwrap_or("input"));
    // A name is one component; folders are named by `subfolder`.
    let is_name = relative(&name).is_some_and(|path| path.as_os_str() == name.as_str() && path.iter().count() == 1);
    let Some(kind) = kind.filter(|_| is_name) else { return StatusCode::BAD_REQUEST.into_response() };
    let subfolder = upload.subfolder.clone();
    let stored = tokio::task::spawn_blocking(move || {
        let Some(folder) = comfy.files.writable(kind, &upload.subfolder)? else { return Ok(None) };
        store(&folder, &name, &bytes, upload.overwrite).map(Some)
    });
    match stored.await {
        Ok(Ok(Some(name))) => {
            Json(json!({ "name": name, "subfolder": subfolder, "type": kind.name() })).into_response()
        }
        Ok(Ok(None)) => StatusCode::BAD_REQUEST.into_response(),
        Ok(Err(error)) => {
            tracing::warn!(%error, "an upload could not be stored");
            super::routes::crash()
        }
        Err(_) => super::routes::crash(),
    }
}

/// None: a field is not what it should be.
async fn read_form(mut multipart: Multipart) -> Result<Option<Upload>, MultipartError> {
    let mut upload = Upload::default();
    while let Some(field) = multipart.next_field().await? {
        let Some(field_name) = field.name().map(str::to_owned) else { continue };
        if field_name == "image" {
            let Some(name) = field.file_name().map(str::to_owned).filter(|name| !name.is_empty()) else {
                return Ok(None);
            };
            upload.image = Some((name, field.bytes().await?));
            continue;
        }
        let value = field.bytes().await?;
        let Ok(value) = String::from_utf8(value.to_vec()) else { return Ok(None) };
        if value.len() > LONGEST_FIELD {
            return Ok(None);
        }
        match field_name.as_str() {
            "type" => upload.kind = Some(value),
            "subfolder" => upload.subfolder = value,
            "overwrite" => upload.overwrite = value == "true" || value == "1",
            _ => {}
        }
    }
    Ok(Some(upload))
}

/// Writes under `name` or, when another file has it, under `name (1)` and so on. A file with the same bytes is taken
/// as the one meant.
fn store(folder: &Path, name: &str, bytes: &[u8], overwrite: bool) -> std::io::Result<String> {
    let (stem, extension) = match name.rfind('.') {
        Some(dot) if dot > 0 => name.split_at(dot),
        _ => (name, ""),
    };
    let mut stored = name.to_owned();
    let mut count = 1;
    loop {
        let path = folder.join(&stored);
        // Not followed: a symbolic link could lead out of the folder, and is never written through.
        match path.symlink_metadata() {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => break,
            Err(error) => return Err(error),
            Ok(metadata) if metadata.is_file() => {
                if overwrite {
                    break;
                }
                if metadata.len() == bytes.len() as u64 && std::fs::read(&path)? == bytes {
                    return Ok(stored);
                }
            }
            Ok(_) => {}
        }
        stored = format!("{stem} ({count}){extension}");
        count += 1;
    }
    std::fs::write(folder.join(&stored), bytes)?;
    Ok(stored)
}

#[derive(Deserialize)]
pub struct Wanted {
    filename: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    subfolder: String,
}

/// One file. `Range` is honoured for a single range; previews in other formats are not made.
pub async fn view(State(comfy): State<Arc<Comfy>>, Query(wanted): Query<Wanted>, headers: HeaderMap) -> Response {
    let Some(filename) = wanted.filename else { return StatusCode::NOT_FOUND.into_response() };
    let (name, annotated) = split_annotation(&filename);
    if name.is_empty() || name.starts_with('/') || name.contains("..") {
        return StatusCode::BAD_REQUEST.into_response();
    }
    let kind = annotated.or_else(|| Kind::parse(wanted.kind.as_deref().unwrap_or("output")));
    let Some(kind) = kind else { return StatusCode::BAD_REQUEST.into_response() };
    if relative(&wanted.subfolder).is_none() {
        return StatusCode::FORBIDDEN.into_response();
    }
    // Only the last part of the name counts, as in ComfyUI.
    let name = name.rsplit('/').next().unwrap_or(name).to_owned();
    let Some(path) = comfy.files.existing(kind, &wanted.subfolder, &name) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    match send_file(&path, &name, &headers).await {
        Ok(response) => response,
        Err(error) => {
            tracing::warn!(%error, "a file could not be read");
            StatusCode::NOT_FOUND.into_response()
        }
    }
}

async fn send_file(path: &Path, name: &str, request: &HeaderMap) -> std::io::Result<Response> {
    let mut file = tokio::fs::File::open(path).await?;
    let metadata = file.metadata().await?;
    let size = metadata.len();
    let changed = metadata.modified()?.duration_since(std::time::UNIX_EPOCH).map_or(0, |age| age.as_nanos());
    let tag = format!("\"{changed:x}-{size:x}\"");
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type(name)));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let quoted = name.replace(['"', '\r', '\n'], "_");
    if let Ok(disposition) = HeaderValue::from_str(&format!("filename=\"{quoted}\"")) {
        headers.insert(header::CONTENT_DISPOSITION, disposition);
    }
    if let Ok(tag) = HeaderValue::from_str(&tag) {
        headers.insert(header::ETAG, tag);
    }
    if request.get(header::IF_NONE_MATCH).is_some_and(|known| known.as_bytes() == tag.as_bytes()) {
        return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
    }
    let range = request.get(header::RANGE).and_then(|range| range.to_str().ok()).and_then(|text| range(text, size));
    let (status, start, length) = match range {
        None => (StatusCode::OK, 0, size),
        Some(Some((start, end))) => {
            insert_text(&mut headers, header::CONTENT_RANGE, format!("bytes {start}-{end}/{size}"));
            (StatusCode::PARTIAL_CONTENT, start, end - start + 1)
        }
        Some(None) => {
            insert_text(&mut headers, header::CONTENT_RANGE, format!("bytes */{size}"));
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, headers).into_response());
        }
    };
    file.seek(std::io::SeekFrom::Start(start)).await?;
    insert_text(&mut headers, header::CONTENT_LENGTH, length.to_string());
    let body = Body::from_stream(ReaderStream::with_capacity(file.take(length), 64 * 1024));
    Ok((status, headers, body).into_response())
}

fn insert_text(headers: &mut HeaderMap, name: header::HeaderName, text: String) {
    if let Ok(value) = HeaderValue::from_str(&text) {
        headers.insert(name, value);
    }
}

/// The first and last byte wanted. None: not a single range, so it is ignored. Some(None): it can't be satisfied.
fn range(text: &str, size: u64) -> Option<Option<(u64, u64)>> {
    let (start, end) = text.strip_prefix("bytes=")?.split_once('-')?;
    let last = size.checked_sub(1);
    let range = match (start.parse::<u64>(), end.parse::<u64>()) {
        (Ok(start), Ok(end)) if start <= end => last.map(|last| (start, end.min(last))),
        (Ok(start), Err(_)) if end.is_empty() => last.map(|last| (start, last)),
        (Err(_), Ok(length)) if start.is_empty() && length > 0 => last.map(|last| (size.saturating_sub(length), last)),
        _ => return None,
    };
    Some(range.filter(|(start, _)| *start < size))
}

fn content_type(name: &str) -> &'static str {
    match name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase()).as_deref() {
        Some("png") => "image/png",
        Some("jpg" | "jpeg") => "image/jpeg",
        Some("webp") => "image/webp",
        Some("gif") => "image/gif",
        Some("mp4") => "video/mp4",
        Some("json") => "application/json",
        _ => "application/octet-stream",
    }
}
