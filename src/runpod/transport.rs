//! One HTTP request and its answer: authorization, limits, the retry of safe calls, errors. Knows no pod.

use std::borrow::Cow;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use jiff::Timestamp;
use reqwest::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, DATE, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER,
};
use reqwest::{Client, Method, Response, StatusCode, Url};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::{ApiOrigin, RunPodOptions, RunPodTimeouts};
use crate::errors::chain;
use crate::provider::ProviderError;

/// A list of some thousand pods stays far below this.
const MAX_BODY: usize = 32 * 1024 * 1024;
/// An error that needs more is no explanation.
const MAX_ERROR_BODY: usize = 64 * 1024;
const MAX_DETAIL_CHARS: usize = 600;
const MAX_ERRORS: usize = 20;
/// Shorter than a server's own limit, so that a POST is not sent into a connection that is just being closed.
const IDLE_CONNECTION: Duration = Duration::from_secs(20);
const DEFAULT_RETRY_AFTER: Duration = Duration::from_secs(10);
/// The longest window of the API's rate limits is an hour.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);
/// A shorter text is no secret, and redacting it would make holes in every message.
const SHORTEST_SECRET: usize = 8;

/// One operation of the API, as its OpenAPI document names it.
#[derive(Debug)]
pub(super) struct Operation {
    pub id: &'static str,
    pub method: Method,
    /// `{id}` stands for the one parameter.
    pub path: &'static str,
    /// What a 404 is about.
    pub what: &'static str,
}

/// One call of an operation.
#[derive(Clone)]
pub(super) struct Call<'a> {
    pub operation: &'static Operation,
    id: Option<&'a str>,
    query: Vec<(&'static str, String)>,
    body: Option<Value>,
    secrets: Vec<&'a str>,
}

/// The body of a success, and the provider's clock.
pub(super) struct Answer {
    pub body: Vec<u8>,
    pub date: Option<Timestamp>,
}

pub(super) struct Transport {
    origin: ApiOrigin,
    key: SecretString,
    user_agent: String,
    timeouts: RunPodTimeouts,
    client: OnceCell<Client>,
}

impl<'a> Call<'a> {
    pub fn new(operation: &'static Operation) -> Self {
        Self { operation, id: None, query: Vec::new(), body: None, secrets: Vec::new() }
    }

    pub fn id(mut self, id: &'a str) -> Self {
        self.id = Some(id);
        self
    }

    pub fn query(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.query.push((name, value.into()));
        self
    }

    pub fn body(mut self, body: Value) -> Self {
        self.body = Some(body);
        self
    }

    /// Values that no error of this call may repeat, even where the provider echoes them.
    pub fn hiding(mut self, secrets: impl Iterator<Item = &'a String>) -> Self {
        self.secrets.extend(secrets.map(String::as_str));
        self
    }

    /// An id comes from outside: one that could change the path is never put into it.
    fn path(&self) -> Result<Cow<'static, str>, ProviderError> {
        let Some(id) = self.id else { return Ok(Cow::Borrowed(self.operation.path)) };
        let plain = !id.is_empty() && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
        if !plain {
            let detail = format!("{} can't be an id", bounded(&format!("{id:?}")));
            return Err(ProviderError::NotFound { what: self.operation.what, detail });
        }
        Ok(Cow::Owned(self.operation.path.replace("{id}", id)))
    }

    /// GET and DELETE have the same effect once and twice; nothing else is ever sent again.
    fn is_repeatable(&self) -> bool {
        matches!(self.operation.method, Method::GET | Method::DELETE)
    }
}

impl Transport {
    pub fn new(options: RunPodOptions) -> Self {
        let RunPodOptions { origin, key, user_agent, timeouts, .. } = options;
        Self { origin, key, user_agent, timeouts, client: OnceCell::new() }
    }

    pub fn origin(&self) -> &ApiOrigin {
        &self.origin
    }

    /// Sends the call, a safe one repeatedly. Bounded in time, whatever the other side does.
    pub async fn send(&self, call: &Call<'_>) -> Result<Answer, ProviderError> {
        if !call.is_repeatable() {
            return self.attempt(call, self.timeouts.create).await;
        }
        let timeouts = &self.timeouts;
        let delays = ExponentialBuilder::default()
            .with_min_delay(timeouts.first_retry)
            .with_max_times(timeouts.attempts.saturating_sub(1))
            .with_jitter();
        let attempts = (|| self.attempt(call, timeouts.request))
            .retry(delays)
            .sleep(tokio::time::sleep)
            .when(|error| self.is_worth_repeating(error))
            .adjust(|error, delay| match error {
                ProviderError::RateLimited { retry_after } => delay.map(|delay| delay.max(*retry_after)),
                _ => delay,
            })
            .notify(|error, delay| {
                tracing::debug!(operation = call.operation.id, ?delay, error = chain(error), "retry")
            });
        match tokio::time::timeout(timeouts.total, attempts).await {
            Ok(result) => result,
            Err(_) => Err(ProviderError::TimedOut { after: timeouts.total }),
        }
    }

    /// Replaces the key and the call's own secrets in a text from outside, and makes it one short line.
    pub fn clean(&self, text: &str, call: &Call<'_>) -> String {
        let mut text = Cow::Borrowed(text);
        for secret in call.secrets.iter().copied().chain([self.key()]) {
            if secret.len() >= SHORTEST_SECRET && text.contains(secret) {
                text = Cow::Owned(text.replace(secret, "[redacted]"));
            }
        }
        bounded(&text)
    }

    fn key(&self) -> &str {
        self.key.expose_secret().trim()
    }

    fn is_worth_repeating(&self, error: &ProviderError) -> bool {
        match error {
            ProviderError::RateLimited { retry_after } => *retry_after <= self.timeouts.longest_rate_limit_wait,
            // What isn't implemented now isn't in half a second either.
            ProviderError::Server { status: 501, .. } => false,
            other => other.is_transient(),
        }
    }

    async fn attempt(&self, call: &Call<'_>, time_limit: Duration) -> Result<Answer, ProviderError> {
        let path = call.path()?;
        let url = self.url(&path, &call.query);
        let authorization = self.authorization()?;
        let client = self.client.get_or_try_init(async || self.build_client()).await?;
        let mut request =
            client.request(call.operation.method.clone(), url).header(AUTHORIZATION, authorization).timeout(time_limit);
        if let Some(body) = &call.body {
            request = request.json(body);
        }

        let started = Instant::now();
        let result = match request.send().await {
            Ok(response) => {
                let status = response.status();
                let rate_limit = header(response.headers(), "ratelimit").map(bounded);
                let result = self.read(call, response, time_limit).await;
                let ms = started.elapsed().as_millis();
                let (method, status) = (&call.operation.method, status.as_u16());
                tracing::debug!(%method, %path, status, ms, rate_limit, "request");
                result
            }
            Err(error) => Err(self.sending_failed(error, time_limit)),
        };
        if let Err(error) = &result {
            let ms = started.elapsed().as_millis();
            tracing::debug!(method = %call.operation.method, %path, ms, error = chain(error), "request failed");
        }
        result
    }

    fn url(&self, path: &str, query: &[(&'static str, String)]) -> Url {
        let mut url = self.origin.join(path);
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        url
    }

    fn authorization(&self) -> Result<HeaderValue, ProviderError> {
        if self.key().is_empty() {
            return Err(ProviderError::MissingKey);
        }
        let mut value = HeaderValue::from_str(&format!("Bearer {}", self.key())).map_err(|_| {
            ProviderError::Setup("the API key holds characters that no key has; copy it again".to_owned())
        })?;
        value.set_sensitive(true);
        Ok(value)
    }

    fn build_client(&self) -> Result<Client, ProviderError> {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // The HTTP library would panic.
            return Err(ProviderError::Setup("this process has installed no TLS cryptography".to_owned()));
        }
        let user_agent = HeaderValue::from_str(&self.user_agent)
            .map_err(|_| ProviderError::Setup("the program's name can't be sent as a User-Agent".to_owned()))?;
        let mut builder = Client::builder()
            .user_agent(user_agent)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .connect_timeout(self.timeouts.connect)
            .pool_idle_timeout(IDLE_CONNECTION);
        if self.origin.is_loopback() {
            builder = builder.no_proxy();
        }
        if self.origin.is_plain() {
            // Reading the system's certificates takes time and fails on a machine that has none; here none are needed.
            let built = builder.tls_certs_only([]).build();
            return built.map_err(|error| ProviderError::Setup(format!("no HTTP client: {}", chain(&error))));
        }
        builder.build().map_err(|error| {
            let cause = chain(&error);
            ProviderError::Setup(format!(
                "https needs the system's CA certificates: install the package `ca-certificates` ({cause})"
            ))
        })
    }

    /// Only a failed connect is certain to have sent nothing.
    fn sending_failed(&self, error: reqwest::Error, time_limit: Duration) -> ProviderError {
        if error.is_connect() {
            ProviderError::Unreachable { origin: self.origin.to_string(), source: Box::new(error.without_url()) }
        } else if error.is_builder() {
            ProviderError::Setup(format!("the request can't be built: {}", chain(&error.without_url())))
        } else {
            receiving_failed(error, time_limit)
        }
    }

    async fn read(
        &self,
        call: &Call<'_>,
        mut response: Response,
        time_limit: Duration,
    ) -> Result<Answer, ProviderError> {
        let status = response.status();
        let unreadable = |reason: String| ProviderError::Unreadable {
            path: format!("{} {}", call.operation.method, call.operation.path),
            reason,
        };
        if status.is_redirection() {
            let target = header(response.headers(), LOCATION.as_str()).unwrap_or("nowhere");
            let target = self.clean(target, call);
            return Err(unreadable(format!(
                "HTTP {} sends the request elsewhere ({target}): a captive portal, or a wrong RUNPOD_API_BASE_URL",
                status.as_u16()
            )));
        }
        if !status.is_success() {
            // The status alone is definite; a body that breaks off only explains less.
            let body = read_body(&mut response, MAX_ERROR_BODY, time_limit).await.unwrap_or_default();
            return Err(self.refusal(call, status, response.headers(), &body));
        }

        let body = read_body(&mut response, MAX_BODY, time_limit).await.map_err(|failure| match failure {
            BodyFailure::TooLarge => unreadable(format!("the body is larger than {} MiB", MAX_BODY >> 20)),
            BodyFailure::Failed(error) => error,
        })?;
        if is_html(response.headers(), &body) {
            return Err(unreadable("an HTML page instead of JSON: a captive portal or a proxy answered".to_owned()));
        }
        let date = header(response.headers(), DATE.as_str()).and_then(parse_date);
        Ok(Answer { body, date })
    }

    fn refusal(&self, call: &Call<'_>, status: StatusCode, headers: &HeaderMap, body: &[u8]) -> ProviderError {
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
        let detail = self.clean(&text, call);
        match status.as_u16() {
            400 => ProviderError::Refused { detail },
            401 => ProviderError::Unauthorized { detail },
            402 => ProviderError::PaymentRequired { detail },
            403 => ProviderError::Forbidden { detail },
            404 => ProviderError::NotFound { what: call.operation.what, detail },
            409 => ProviderError::Conflict { detail },
            422 => {
                let told = problem["errors"].as_array().map(Vec::as_slice).unwrap_or_default();
                let errors = told.iter().take(MAX_ERRORS).map(|error| self.clean(&plain_text(error), call)).collect();
                ProviderError::Invalid { detail, errors }
            }
            429 => ProviderError::RateLimited { retry_after: retry_after(headers) },
            // 408 comes from something in between that may or may not have passed the request on.
            status @ (408 | 500..) => ProviderError::Server { status, detail },
            status => ProviderError::Refused { detail: format!("HTTP {status}: {detail}") },
        }
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

fn receiving_failed(error: reqwest::Error, time_limit: Duration) -> ProviderError {
    if error.is_timeout() {
        ProviderError::TimedOut { after: time_limit }
    } else {
        ProviderError::Broken { source: Box::new(error.without_url()) }
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
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

fn retry_after(headers: &HeaderMap) -> Duration {
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
fn bounded(text: &str) -> String {
    let mut rest = text.trim().chars();
    let mut line: String = rest.by_ref().take(MAX_DETAIL_CHARS).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if rest.next().is_some() {
        line.push('…');
    }
    line
}
