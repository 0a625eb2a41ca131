//! Finds the `id` of a message that is never held in memory as a whole.

use serde_json::Value;

/// Longer keys and values of the outermost object can't be `id` and an id that somebody waits for.
const LONGEST_TOKEN: usize = 256;

/// Reads JSON byte by byte and remembers the outermost object's `id`, in constant memory. It checks no grammar: on
/// anything but JSON its answer is worthless but harmless.
#[derive(Debug, Default)]
pub(super) struct IdScanner {
    depth: usize,
    deepest: usize,
    in_string: bool,
    escaped: bool,
    /// The key and the value now read at the outermost level; what lies deeper is left out.
    key: Vec<u8>,
    value: Vec<u8>,
    in_value: bool,
    id: Option<Value>,
}

impl IdScanner {
    pub(super) fn read(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.step(*byte);
        }
    }

    /// Null when there was none that is a string or an integer.
    pub(super) fn id(&self) -> Value {
        self.id.clone().unwrap_or(Value::Null)
    }

    pub(super) fn deepest(&self) -> usize {
        self.deepest
    }

    fn step(&mut self, byte: u8) {
        if self.in_string {
            self.keep(byte);
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return;
        }
        match byte {
            b'"' => {
                self.in_string = true;
                self.keep(byte);
            }
            b'{' | b'[' => {
                // A nested value leaves a mark, or an `id` that is an object would read as empty.
                self.keep(byte);
                self.depth += 1;
                self.deepest = self.deepest.max(self.depth);
            }
            b'}' | b']' => {
                if self.depth == 1 {
                    self.end_of_pair();
                }
                self.depth = self.depth.saturating_sub(1);
            }
            b':' if self.depth == 1 => self.in_value = true,
            b',' if self.depth == 1 => self.end_of_pair(),
            byte if byte.is_ascii_whitespace() => {}
            byte => self.keep(byte),
        }
    }

    fn keep(&mut self, byte: u8) {
        let token = if self.in_value { &mut self.value } else { &mut self.key };
        if self.depth == 1 && token.len() <= LONGEST_TOKEN {
            token.push(byte);
        }
    }

    fn end_of_pair(&mut self) {
        if self.key == b"\"id\"" && self.value.len() <= LONGEST_TOKEN {
            self.id = serde_json::from_slice(&self.value).ok().filter(super::is_id);
        }
        self.key.clear();
        self.value.clear();
        self.in_value = false;
    }
}
