//! Server-sent events as bytes come in: `id:` and `data:` lines up to an empty one.

use std::collections::VecDeque;

use reqwest::Response;
use serde::Deserialize;

use crate::provider::{LogLine, LogSource, ProviderError};

/// A longer event is left out: nobody reads such a line, and it must not fill the memory.
const MOST_EVENT: usize = 1024 * 1024;

pub(super) struct Events {
    response: Response,
    parser: Parser,
}

#[derive(Debug, PartialEq)]
pub(super) struct Event {
    pub id: Option<String>,
    pub line: LogLine,
}

impl Events {
    pub fn new(response: Response) -> Self {
        Self { response, parser: Parser::default() }
    }

    /// `None` when the other side ended the stream. Loses nothing when it is cancelled.
    pub async fn next(&mut self) -> Result<Option<Event>, ProviderError> {
        loop {
            if let Some(event) = self.parser.ready.pop_front() {
                return Ok(Some(event));
            }
            match self.response.chunk().await {
                Ok(Some(bytes)) => self.parser.feed(&bytes),
                Ok(None) => return Ok(None),
                Err(error) => return Err(ProviderError::Broken { source: Box::new(error.without_url()) }),
            }
        }
    }
}

#[derive(Default)]
struct Parser {
    ready: VecDeque<Event>,
    /// The bytes of a line whose end isn't here yet.
    line: Vec<u8>,
    id: Option<String>,
    data: String,
    is_too_long: bool,
}

impl Parser {
    fn feed(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            if self.line.len() + self.data.len() + piece.len() > MOST_EVENT {
                self.is_too_long = true;
                self.data.clear();
            }
            let room = MOST_EVENT - self.line.len();
            self.line.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                self.end_of_line(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
            }
        }
    }

    fn end_of_line(&mut self, line: &str) {
        if line.is_empty() {
            return self.end_of_event();
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.id = Some(value.to_owned()).filter(|id| !id.is_empty()),
            "data" => {
                if !self.data.is_empty() {
                    self.data.push('\n');
                }
                self.data.push_str(value);
            }
            // A comment that keeps the connection alive, or something that a log doesn't need.
            _ => {}
        }
    }

    fn end_of_event(&mut self) {
        let (data, id) = (std::mem::take(&mut self.data), self.id.take());
        if std::mem::take(&mut self.is_too_long) {
            tracing::debug!("a log line of more than {MOST_EVENT} bytes is left out");
        } else if let Some(line) = log_line(&data) {
            self.ready.push_back(Event { id, line });
        }
    }
}

/// `None` for an event that is no line, such as a sign of life.
fn log_line(data: &str) -> Option<LogLine> {
    #[derive(Deserialize)]
    struct Data {
        ts: Option<String>,
        source: Option<String>,
        line: String,
    }
    let data: Data = serde_json::from_str(data).ok()?;
    let source = match data.source.as_deref() {
        Some("container") => Some(LogSource::Container),
        Some("system") => Some(LogSource::System),
        _ => None,
    };
    Some(LogLine { at: data.ts.and_then(|ts| ts.parse().ok()), source, text: data.line })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &[u8], step: usize) -> Vec<(Option<String>, String)> {
        let mut parser = Parser::default();
        text.chunks(step).for_each(|chunk| parser.feed(chunk));
        parser.ready.into_iter().map(|event| (event.id, event.line.text)).collect()
    }

    #[test]
    fn events_are_the_same_however_they_are_cut() {
        let text = "retry: 5\n: alive\n\nid: a/1\r\ndata: {\"line\":\"ünö\",\"new\":1}\r\n\r\nevent: ping\ndata: {}\n\n\
                    data:{\ndata: \"line\":\"two\"}\n\ndata: no JSON\n\nid\ndata: {\"line\":\"\"}\n\ndata: {\"line\":\"half";
        let expected = [(Some("a/1".to_owned()), "ünö".to_owned()), (None, "two".to_owned()), (None, String::new())];
        for step in [1, 2, 3, 7, 1000] {
            assert_eq!(parsed(text.as_bytes(), step), expected, "{step}");
        }
    }

    #[test]
    fn an_endless_line_is_left_out_and_what_follows_is_read() {
        let mut text = b"data: {\"line\":\"".to_vec();
        text.resize(MOST_EVENT * 3, b'x');
        text.extend_from_slice(b"\"}\n\ndata: {\"line\":\"after\"}\n\n");
        assert_eq!(parsed(&text, 4096), [(None, "after".to_owned())]);
        let mut many = b"data: x\n".repeat(MOST_EVENT / 4);
        many.extend_from_slice(b"\ndata: {\"line\":\"after\"}\n\n");
        assert_eq!(parsed(&many, 4096), [(None, "after".to_owned())]);
    }
}
