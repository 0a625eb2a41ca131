//! `/`: a small page that shows whose server this is, its queue and its last pictures.

use axum::http::header;
use axum::response::{Html, IntoResponse, Response};

pub async fn show() -> Response {
    ([(header::CACHE_CONTROL, "no-cache")], Html(include_str!("page.html"))).into_response()
}
