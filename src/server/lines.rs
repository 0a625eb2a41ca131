//! The filter between stdin and the protocol: one JSON-RPC message a line, and none that could stop the server.
//!
//! A line that isn't JSON is logged and ignored, as the official servers do, for an answer could start an endless
//! exchange of errors. A line that is JSON but no message, or too long to be held, is refused with its `id`, so that
//! its caller doesn't wait for ever; the next line works.

mod id_scanner;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};

use id_scanner::IdScanner;

/// The longest line that is read as a message, in bytes. What follows is thrown away as it comes.
const LONGEST_LINE: usize = 8 * 1024 * 1024;
/// `serde_json` refuses deeper nesting, and rightly so: it would cost stack.
const DEEPEST_NESTING: usize = 127;

#[derive(Debug, PartialEq)]
pub enum Line {
    /// A JSON object of the shape of a JSON-RPC 2.0 message.
    Message(Value),
    /// To be answered with -32600. `id` is null where it can't be read.
    Refused { id: Value, reason: String },
}

#[derive(Debug)]
pub struct LineReader<R> {
    input: BufReader<R>,
}

/// A whole line, or the `id` of one that was too long to be held.
enum Raw {
    Whole(Vec<u8>),
    TooLong { id: Value, length: usize },
}

impl<R: AsyncRead + Unpin> LineReader<R> {
    pub fn new(input: R) -> Self {
        Self { input: BufReader::with_capacity(64 * 1024, input) }
    }

    /// The next line that matters; `None` at the end of the input.
    pub async fn next(&mut self) -> std::io::Result<Option<Line>> {
        loop {
            let line = match self.next_raw().await? {
                None => return Ok(None),
                Some(Raw::Whole(bytes)) => understand(&bytes),
                Some(Raw::TooLong { id, length }) => Some(Line::Refused {
                    id,
                    reason: format!(
                        "the message has {length} bytes, more than the {LONGEST_LINE} that are read; pass a path \
                         to a file instead of its content"
                    ),
                }),
            };
            if line.is_some() {
                return Ok(line);
            }
        }
    }

    async fn next_raw(&mut self) -> std::io::Result<Option<Raw>> {
        let mut held = Vec::new();
        // Set as soon as the line is too long: from then on only the scanner sees the bytes.
        let mut scanner: Option<IdScanner> = None;
        let mut length = 0;
        loop {
            let available = self.input.fill_buf().await?;
            if available.is_empty() {
                // A last line without its newline may have been cut off in the middle.
                return Ok(None);
            }
            let newline = available.iter().position(|byte| *byte == b'\n');
            let part = &available[..newline.unwrap_or(available.len())];
            length += part.len();
            match &mut scanner {
                Some(scanner) => scanner.read(part),
                None if length > LONGEST_LINE => {
                    let mut late = IdScanner::default();
                    late.read(&held);
                    late.read(part);
                    held = Vec::new();
                    scanner = Some(late);
                }
                None => held.extend_from_slice(part),
            }
            let consumed = part.len() + usize::from(newline.is_some());
            self.input.consume(consumed);
            if newline.is_some() {
                return Ok(Some(match scanner {
                    None => Raw::Whole(held),
                    Some(scanner) => Raw::TooLong { id: scanner.id(), length },
                }));
            }
        }
    }
}

/// `None` for what is to be ignored.
fn understand(line: &[u8]) -> Option<Line> {
    let line = line.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(line).trim_ascii();
    if line.is_empty() {
        return None;
    }
    match serde_json::from_slice::<Value>(line) {
        Ok(value) => Some(match fault(&value) {
            None => Line::Message(value),
            Some(reason) => Line::Refused { id: readable_id(&value), reason: reason.to_owned() },
        }),
        Err(error) => {
            let mut scanner = IdScanner::default();
            scanner.read(line);
            if scanner.deepest() > DEEPEST_NESTING {
                return Some(Line::Refused {
                    id: scanner.id(),
                    reason: format!("the message is nested deeper than {DEEPEST_NESTING} levels"),
                });
            }
            tracing::warn!(bytes = line.len(), %error, "a line on stdin is not JSON and was ignored");
            None
        }
    }
}

/// What keeps this JSON from being a message of JSON-RPC 2.0 as MCP uses it.
fn fault(value: &Value) -> Option<&'static str> {
    let Value::Object(message) = value else {
        return Some(match value {
            Value::Array(_) => "batches are not supported; send one message a line",
            _ => "a message is a JSON object",
        });
    };
    if message.get("jsonrpc").is_none_or(|version| version != "2.0") {
        return Some("`jsonrpc` must be \"2.0\"");
    }
    if message.get("id").is_some_and(|id| !is_id(id)) {
        return Some("`id` must be a string or an integer");
    }
    match (message.get("method"), message.contains_key("result"), message.contains_key("error")) {
        (Some(Value::String(_)), false, false) => match message.get("params") {
            None | Some(Value::Object(_)) => None,
            Some(_) => Some("`params` must be an object of named parameters"),
        },
        (Some(Value::String(_)), ..) => Some("a message has a `method` or a `result`, not both"),
        (Some(_), ..) => Some("`method` must be a string"),
        (None, true, false) | (None, false, true) => None,
        (None, ..) => Some("a message has a `method`, a `result` or an `error`"),
    }
}

fn is_id(id: &Value) -> bool {
    id.is_string() || id.is_i64() || id.is_u64()
}

fn readable_id(value: &Value) -> Value {
    value.get("id").filter(|id| is_id(id)).cloned().unwrap_or(Value::Null)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    async fn lines(input: &[u8]) -> Vec<Line> {
        let mut reader = LineReader::new(input);
        let mut lines = Vec::new();
        while let Some(line) = reader.next().await.expect("reading from memory") {
            lines.push(line);
        }
        lines
    }

    fn refused_id(line: &Line) -> Option<&Value> {
        match line {
            Line::Refused { id, .. } => Some(id),
            Line::Message(_) => None,
        }
    }

    #[tokio::test]
    async fn lets_messages_through_and_ignores_what_is_not_json() {
        let request = json!({"jsonrpc": "2.0", "id": 1, "method": "ping"});
        let input = format!("hello\n\n\u{feff}{request}\r\n{{\"jsonrpc\n{request}");
        assert_eq!(lines(input.as_bytes()).await, [Line::Message(request)]);
    }

    #[tokio::test]
    async fn refuses_bad_shapes_with_their_id() {
        let cases = [
            (r#"[{"jsonrpc":"2.0","id":1,"method":"ping"}]"#, json!(null)),
            (r#""ping""#, json!(null)),
            (r#"{"id":2,"method":"ping"}"#, json!(2)),
            (r#"{"jsonrpc":"2.0","id":"a","method":7}"#, json!("a")),
            (r#"{"jsonrpc":"2.0","id":3,"method":"ping","params":[1]}"#, json!(3)),
            (r#"{"jsonrpc":"2.0","id":null,"method":"ping"}"#, json!(null)),
            (r#"{"jsonrpc":"2.0","id":1.5,"method":"ping"}"#, json!(null)),
            (r#"{"jsonrpc":"2.0","id":4}"#, json!(4)),
            (r#"{"jsonrpc":"2.0","id":5,"method":"ping","result":{}}"#, json!(5)),
        ];
        for (line, id) in cases {
            let got = lines(format!("{line}\n").as_bytes()).await;
            assert_eq!(got.iter().filter_map(refused_id).collect::<Vec<_>>(), [&id], "{line}: {got:?}");
        }
    }

    #[tokio::test]
    async fn refuses_a_line_too_long_with_the_id_before_or_behind_its_bulk() {
        let bulk = "x".repeat(LONGEST_LINE);
        let input = format!(
            "{{\"jsonrpc\":\"2.0\",\"id\":7,\"params\":{{\"id\":1,\"text\":\"{bulk}\"}}}}\n\
             {{\"params\":{{\"text\":\"{bulk}\\\",\\\"id\\\":2\",\"id\":3}},\"jsonrpc\":\"2.0\", \"id\" : \"last\"}}\n\
             {bulk}x\n{{\"jsonrpc\":\"2.0\",\"id\":8,\"method\":\"ping\"}}\n"
        );
        let got = lines(input.as_bytes()).await;
        assert_eq!(got.len(), 4);
        assert_eq!(refused_id(&got[0]), Some(&json!(7)));
        assert_eq!(refused_id(&got[1]), Some(&json!("last")));
        assert_eq!(refused_id(&got[2]), Some(&json!(null)));
        assert_eq!(got[3], Line::Message(json!({"jsonrpc": "2.0", "id": 8, "method": "ping"})));
    }

    #[tokio::test]
    async fn refuses_deep_nesting_with_its_id() {
        let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
        let got = lines(format!("{{\"jsonrpc\":\"2.0\",\"id\":9,\"params\":{{\"a\":{deep}}}}}\n").as_bytes()).await;
        assert_eq!(got.iter().filter_map(refused_id).collect::<Vec<_>>(), [&json!(9)]);
    }
}
