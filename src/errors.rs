//! How an error is told with its causes.

/// The error with every cause below it, for logs and for the edge. A cause that repeats the line above it is left out.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(below) = cause {
        let line = below.to_string();
        if !text.ends_with(&line) {
            text.push_str(": ");
            text.push_str(&line);
        }
        cause = below.source();
    }
    text
}
