//! What comes back: a body within its limits, or the refusal that a status stands for.

use std::borrow::Cow;
use std::time::Duration;

use jiff::Timestamp;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Response, StatusCode};
use serde_json::Value;

use super::transport::Operation;
use crate::provider::ProviderError;

/// A list of some thousand pods stays far below this.
const MAX_BODY: usize = 32 * 1024 * 1024;
/// An error that needs more is no explanation.
const MAX_ERROR_BODY: usize = 64 * 1024;
const MAX_DETAIL_CHARS: usize = 600;
const MAX_ERRORS: usize = 20;
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(10);
/// The longest window of the API's rate limits is an hour.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);

/// The body of a success, and the provider's clock.
pub(super) struct Answer {
    pub body: Vec<u8>,
    pub date: Option<Timestamp>,
}

/// Makes a text from outside fit to be shown.
pub(super) type Clean<'a> = &'a (dyn Fn(&str) -> String + Sync);

/// The response, if its status is a success.
pub(super) async fn accept(
    operation: &Operation,
    mut response: Response,
    time_limit: Duration,
    clean: Clean<'_>,
) -> Result<Response, ProviderError> {
    let status = response.status();
    if status.is_redirection() {
        let target = clean(header(response.headers(), LOCATION.as_str()).unwrap_or("nowhere"));
        let reason = format!(
            "HTTP {} sends the request elsewhere ({target}): a captive portal, or a wrong address of the API (RUNPOD_API_BASE_URL, or api_base_url in config.json)",
            status.as_u16()
        );
        return Err(unreadable(operation, reason));
    }
    if !status.is_success() {
        // The status alone is definite; a body that breaks off only explains less.
        let body = read_body(&mut response, MAX_ERROR_BODY, time_limit).await.unwrap_or_default();
        return Err(refusal(operation, status, response.headers(), &body, clean));
    }
    if is_html(response.headers(), &[]) {
        return Err(html(operation));
    }
    Ok(response)
}

/// The whole body of a success.
pub(super) async fn read(
    operation: &Operation,
    mut response: Response,
    time_limit: Duration,
) -> Result<Answer, ProviderError> {
    let body = read_body(&mut response, MAX_BODY, time_limit).await.map_err(|failure| match failure {
        BodyFailure::TooLarge => unreadable(operation, format!("the body is larger than {} MiB", MAX_BODY >> 20)),
        BodyFailure::Failed(error) => error,
    })?;
    if is_html(response.headers(), &body) {
        return Err(html(operation));
    }
    let date = header(response.headers(), DATE.as_str()).and_then(parse_date);
    Ok(Answer { body, date })
}

fn unreadable(operation: &Operation, reason: String) -> ProviderError {
    ProviderError::Unreadable { path: format!("{} {}", operation.method, operation.path), reason }
}

fn html(operation: &Operation) -> ProviderError {
    unreadable(operation, "an HTML page instead of JSON: a captive portal or a proxy answered".to_owned())
}

fn refusal(
    operation: &Operation,
    status: StatusCode,
    headers: &HeaderMap,
    body: &[u8],
    clean: Clean<'_>,
) -> ProviderError {
    // `application/problem+json`, as far as it is there.
    let problem: Value = serde_json::from_slice(body).unwrap_or_default();
    let told = ["detail", "title"].iter().find_map(|name| problem[*name].as_str().filter(|text| !text.is_empty()));
    let text = match told {
        Some(text) => text.to_owned(),
        None if is_html(headers, body) => {
            format!("HTTP {} with an HTML page, not the API's own answer", status.as_u16())
        }
        None => format!("HTTP {status}, without an explanation"),
    };
    let detail = clean(&text);
    match status.as_u16() {
        400 => ProviderError::Refused { detail },
        401 => ProviderError::Unauthorized { detail },
        402 => ProviderError::PaymentRequired { detail },
        403 => ProviderError::Forbidden { detail },
        404 => ProviderError::NotFound { what: operation.what, detail },
        409 => ProviderError::Conflict { detail },
        422 => {
            let told = problem["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
            let errors = told.iter().take(MAX_ERRORS).map(|error| clean(&plain_text(error))).collect();
            ProviderError::Invalid { detail, errors }
        }
        429 => ProviderError::RateLimited { retry_after: retry_after(headers) },
        // 408 comes from something in between that may or may not have passed the request on.
        status @ (408 | 500..) => ProviderError::Server { status, detail },
        status => ProviderError::Refused { detail: format!("HTTP {status}: {detail}") },
    }
}

enum BodyFailure {
    TooLarge,
    Failed(ProviderError),
}

async fn read_body(response: &mut Response, limit: usize, time_limit: Duration) -> Result<Vec<u8>, BodyFailure> {
    let announced = header(response.headers(), CONTENT_LENGTH.as_str()).and_then(|text| text.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit as u64) {
        return Err(BodyFailure::TooLarge);
    }
    let mut body = Vec::new();
    loop {
        match response.chunk().await {
            Ok(Some(chunk)) if body.len() + chunk.len() > limit => return Err(BodyFailure::TooLarge),
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => return Ok(body),
            Err(error) => return Err(BodyFailure::Failed(receiving_failed(error, time_limit))),
        }
    }
}

pub(super) fn receiving_failed(error: reqwest::Error, time_limit: Duration) -> ProviderError {
    if error.is_timeout() {
        ProviderError::TimedOut { after: time_limit }
    } else {
        ProviderError::Broken { source: Box::new(error.without_url()) }
    }
}

pub(super) fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn is_html(headers: &HeaderMap, body: &[u8]) -> bool {
    let told = header(headers, CONTENT_TYPE.as_str()).is_some_and(|kind| kind.trim_start().starts_with("text/html"));
    told || body.trim_ascii_start().starts_with(b"<")
}

/// `Date: Sun, 06 Nov 1994 08:49:37 GMT`.
fn parse_date(text: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text).ok()
}

pub(super) fn retry_after(headers: &HeaderMap) -> Duration {
    let told = header(headers, RETRY_AFTER.as_str()).and_then(|text| text.trim().parse().ok());
    told.map_or(DEFAULT_RETRY_AFTER, Duration::from_secs).min(LONGEST_RETRY_AFTER)
}

/// An entry of `errors` is a string by the contract; another shape is shown as it is.
fn plain_text(value: &Value) -> Cow<'_, str> {
    match value {
        Value::String(text) => Cow::Borrowed(text),
        other => Cow::Owned(other.to_string()),
    }
}

/// One line of bounded length: control characters could do things to a terminal.
pub(super) fn bounded(text: &str) -> String {
    let mut rest = text.trim().chars();
    let mut line: String = rest.by_ref().take(MAX_DETAIL_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if rest.next().is_some() {
        line.push('…');
    }
    line
}
