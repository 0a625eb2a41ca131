//! How an error is told with its causes, and how words from outside are made harmless.

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

/// Without what would steer a terminal or show a line otherwise than it is: control characters except the newline, and
/// the marks that turn the direction of writing. Names and error texts of providers and of pods may hold any of them.
pub fn harmless(text: &str) -> String {
    let steers = |c: char| {
        (c.is_control() && c != '\n')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
    };
    text.chars().map(|c| if steers(c) { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_from_outside_can_not_steer() {
        assert_eq!(
            harmless("a\u{1b}[2Jb\u{9b}c\rd\u{7f}\u{202e}e"),
            "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d\u{fffd}\u{fffd}e"
        );
        assert_eq!(harmless("two\nlines, Grüße, 写真"), "two\nlines, Grüße, 写真");
    }
}
