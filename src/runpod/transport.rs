//! One HTTP request and its answer: authorization, limits, the retry of safe calls, errors. Knows no pod.

use std::borrow::Cow;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, Method, Response, Url};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::sync::OnceCell;
use tokio::time::Instant;

use super::answer::{self, Answer, bounded, header, receiving_failed};
use super::budget::{Budget, Told};
use super::{ApiOrigin, RunPodOptions, RunPodTimeouts};
use crate::background::account_of;
use crate::errors::chain;
use crate::provider::ProviderError;

/// Shorter than a server's own limit, so that few requests are sent into a connection that is just being closed.
const IDLE_CONNECTION: Duration = Duration::from_secs(20);
const MOST_KEPT_CONNECTIONS: usize = 8;
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
    last_event_id: Option<String>,
    secrets: Vec<&'a str>,
}

pub(super) struct Transport {
    origin: ApiOrigin,
    key: SecretString,
    user_agent: String,
    timeouts: RunPodTimeouts,
    budget: Budget,
    client: OnceCell<Client>,
    client_for_changes: OnceCell<Client>,
}

impl<'a> Call<'a> {
    pub fn new(operation: &'static Operation) -> Self {
        Self { operation, id: None, query: Vec::new(), body: None, last_event_id: None, secrets: Vec::new() }
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

    /// Takes a stream up again after the event of this id.
    pub fn last_event_id(mut self, id: String) -> Self {
        self.last_event_id = Some(id);
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
        let RunPodOptions { origin, key, user_agent, timeouts, budget } = options;
        let budget = Budget::new(budget, account_of(&origin.to_string(), &key));
        let (client, client_for_changes) = (OnceCell::new(), OnceCell::new());
        Self { origin, key, user_agent, timeouts, budget, client, client_for_changes }
    }

    pub fn origin(&self) -> &ApiOrigin {
        &self.origin
    }

    /// Sends the call, a safe one repeatedly. Bounded in time, whatever the other side does.
    pub async fn send(&self, call: &Call<'_>) -> Result<Answer, ProviderError> {
        let timeouts = &self.timeouts;
        if !call.is_repeatable() {
            let free_by = Instant::now() + timeouts.create;
            return self.attempt(call, timeouts.create, free_by).await;
        }
        self.repeat(call, |free_by| self.attempt(call, timeouts.request, free_by)).await
    }

    /// Sends a safe call whose answer has no end; only its head is waited for.
    pub async fn open(&self, call: &Call<'_>) -> Result<Response, ProviderError> {
        self.repeat(call, |free_by| self.exchange(call, None, free_by)).await
    }

    async fn repeat<T, F: Future<Output = Result<T, ProviderError>>>(
        &self,
        call: &Call<'_>,
        attempt: impl Fn(Instant) -> F,
    ) -> Result<T, ProviderError> {
        let timeouts = &self.timeouts;
        let deadline = Instant::now() + timeouts.total;
        let free_by = deadline.checked_sub(timeouts.connect).unwrap_or(deadline);
        let delays = ExponentialBuilder::default()
            .with_min_delay(timeouts.first_retry)
            .with_max_times(timeouts.attempts.saturating_sub(1))
            .with_jitter();
        let attempts = (|| attempt(free_by))
            .retry(delays)
            .sleep(tokio::time::sleep)
            .when(|error| self.is_worth_repeating(error, free_by))
            .adjust(|error, delay| match error {
                ProviderError::RateLimited { retry_after } => delay.map(|delay| delay.max(*retry_after)),
                _ => delay,
            })
            .notify(|error, delay| {
                tracing::debug!(operation = call.operation.id, ?delay, error = chain(error), "retry")
            });
        match tokio::time::timeout_at(deadline, attempts).await {
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

    fn is_worth_repeating(&self, error: &ProviderError, free_by: Instant) -> bool {
        match error {
            ProviderError::RateLimited { retry_after } => {
                *retry_after <= self.timeouts.longest_rate_limit_wait && Instant::now() + *retry_after <= free_by
            }
            // What isn't implemented now isn't in half a second either.
            ProviderError::Server { status: 501, .. } => false,
            other => other.is_transient(),
        }
    }

    async fn attempt(&self, call: &Call<'_>, limit: Duration, free_by: Instant) -> Result<Answer, ProviderError> {
        let response = self.exchange(call, Some(limit), free_by).await?;
        let result = answer::read(call.operation, response, limit).await;
        if let Err(error) = &result {
            tracing::debug!(operation = call.operation.id, error = chain(error), "the answer can't be read");
        }
        result
    }

    /// One request, when the rate limits have room for it, and the head of its answer. With `limit` the answer's body
    /// has to be there in that time too.
    async fn exchange(
        &self,
        call: &Call<'_>,
        limit: Option<Duration>,
        free_by: Instant,
    ) -> Result<Response, ProviderError> {
        let path = call.path()?;
        let method = &call.operation.method;
        let mut request = self.client(call).await?.request(method.clone(), self.url(&path, &call.query));
        request = request.header(AUTHORIZATION, self.authorization()?);
        if let Some(limit) = limit {
            request = request.timeout(limit);
        }
        if let Some(id) = &call.last_event_id {
            request = request.header("Last-Event-ID", id);
        }
        if let Some(body) = &call.body {
            request = request.json(body);
        }

        let limit = limit.unwrap_or(self.timeouts.request);
        let urgent = *method == Method::DELETE;
        let ticket = self.budget.take(urgent, limit, free_by).await?;
        let started = Instant::now();
        let sent = tokio::time::timeout(limit, request.send()).await;
        let told = sent.as_ref().ok().and_then(|sent| sent.as_ref().ok()).map(Told::from_response);
        self.budget.settle(ticket, told).await;
        let result = match sent {
            Ok(Ok(response)) => {
                let status = response.status().as_u16();
                let rate_limit = header(response.headers(), "ratelimit").map(bounded);
                let ms = started.elapsed().as_millis();
                tracing::debug!(%method, %path, status, ms, rate_limit, "request");
                answer::accept(call.operation, response, limit, &|text| self.clean(text, call)).await
            }
            Ok(Err(error)) => Err(self.sending_failed(error, limit)),
            Err(_) => Err(ProviderError::TimedOut { after: limit }),
        };
        if let Err(error) = &result {
            let ms = started.elapsed().as_millis();
            tracing::debug!(%method, %path, ms, error = chain(error), "request failed");
        }
        result
    }

    /// What may not be sent twice goes over a connection of its own: one that was kept may have been closed by the
    /// other side, and then nobody could tell whether the request arrived.
    async fn client(&self, call: &Call<'_>) -> Result<&Client, ProviderError> {
        let (client, kept) = match call.is_repeatable() {
            true => (&self.client, MOST_KEPT_CONNECTIONS),
            false => (&self.client_for_changes, 0),
        };
        client.get_or_try_init(async || self.build_client(kept)).await
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

    fn build_client(&self, kept_connections: usize) -> Result<Client, ProviderError> {
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
            .pool_max_idle_per_host(kept_connections)
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
}
