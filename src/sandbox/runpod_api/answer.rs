//! Answers and problems as RunPod shapes them.

use axum::body::Body;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::logs::LogStream;
use crate::sandbox::request_log::Entry;

/// What becomes of a request.
pub enum Outcome {
    Answered {
        answer: Answer,
        injected: bool,
    },
    /// Never answered.
    Silent,
    /// The connection is cut.
    Cut,
}

pub struct Answer {
    pub status: u16,
    pub body: AnswerBody,
    headers: Vec<(&'static str, String)>,
}

pub enum AnswerBody {
    Empty,
    Json(Value),
    Problem(Value),
    Events(LogStream),
    Garbage,
}

/// An error answer: `application/problem+json`.
#[derive(Debug)]
pub struct Problem {
    pub status: u16,
    pub detail: String,
    /// One entry a violation, for a 422.
    pub errors: Vec<String>,
}

impl Outcome {
    pub fn plain(answer: Answer) -> Self {
        Self::Answered { answer, injected: false }
    }

    pub fn injected(answer: Answer) -> Self {
        Self::Answered { answer, injected: true }
    }

    /// Completes the request's entry in the log.
    pub fn write_down(&self, entry: &mut Entry) {
        match self {
            Self::Answered { answer, injected } => {
                entry.status = Some(answer.status);
                entry.content_type = answer.body.content_type().map(str::to_owned);
                entry.injected = *injected;
                entry.response_body = match &answer.body {
                    AnswerBody::Json(body) | AnswerBody::Problem(body) => body.clone(),
                    AnswerBody::Garbage => Value::String(GARBAGE.to_owned()),
                    AnswerBody::Empty | AnswerBody::Events(_) => Value::Null,
                };
            }
            Self::Silent | Self::Cut => entry.injected = true,
        }
    }
}

impl Answer {
    pub fn ok(body: Value) -> Self {
        Self { status: 200, body: AnswerBody::Json(body), headers: Vec::new() }
    }

    pub fn created(body: Value) -> Self {
        Self { status: 201, ..Self::ok(body) }
    }

    pub fn no_content() -> Self {
        Self { status: 204, body: AnswerBody::Empty, headers: Vec::new() }
    }

    pub fn events(stream: LogStream) -> Self {
        Self { status: 200, body: AnswerBody::Events(stream), headers: Vec::new() }
    }

    /// The same answer with a body that can't be read.
    pub fn garbled(self) -> Self {
        Self { body: AnswerBody::Garbage, ..self }
    }

    pub fn with_header(mut self, name: &'static str, value: String) -> Self {
        self.set_header(name, value);
        self
    }

    pub fn set_header(&mut self, name: &'static str, value: String) {
        self.headers.push((name, value));
    }
}

/// Not JSON, and cut off in the middle of a character.
const GARBAGE: &str = "{\"id\": \"\u{fffd}\u{fffd}<html>";

impl AnswerBody {
    fn content_type(&self) -> Option<&'static str> {
        match self {
            Self::Empty => None,
            Self::Json(_) | Self::Garbage => Some("application/json"),
            Self::Problem(_) => Some("application/problem+json"),
            Self::Events(_) => Some("text/event-stream"),
        }
    }
}

impl IntoResponse for Answer {
    fn into_response(self) -> Response {
        let content_type = self.body.content_type();
        let body = match self.body {
            AnswerBody::Empty => Body::empty(),
            AnswerBody::Json(body) | AnswerBody::Problem(body) => Body::from(body.to_string()),
            AnswerBody::Garbage => Body::from(GARBAGE),
            AnswerBody::Events(stream) => stream.into_body(),
        };
        let mut response = Response::new(body);
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let headers = response.headers_mut();
        if let Some(content_type) = content_type {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        }
        for (name, value) in self.headers {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
        response
    }
}

impl Problem {
    pub fn new(status: u16, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), errors: Vec::new() }
    }

    /// The body or the parameters break the contract.
    pub fn invalid(errors: Vec<String>) -> Self {
        Self { status: 422, detail: "Request validation failed.".to_owned(), errors }
    }

    pub fn into_answer(self) -> Answer {
        let title = StatusCode::from_u16(self.status).ok().and_then(|status| status.canonical_reason());
        let mut body = json!({ "title": title.unwrap_or("Error"), "status": self.status, "detail": self.detail });
        if !self.errors.is_empty() {
            body["errors"] = json!(self.errors);
        }
        Answer { status: self.status, body: AnswerBody::Problem(body), headers: Vec::new() }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        self.into_answer().into_response()
    }
}
