//! pod_logs: what a pod has said.

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use jiff::{SignedDuration, Timestamp};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{find_or_only, while_a_pod_runs};
use crate::fleet::later;
use crate::provider::{LogLimits, LogLine, LogQuery, LogSource, ProviderError};
use crate::tools::context::Services;
use crate::tools::{Context, Effect, Tool, ToolError, decode};

const DEFAULT_TAIL: u32 = 100;
/// What an assistant is to read at most.
const MOST_CHARS: usize = 24_000;
const MOST_CHARS_A_LINE: usize = 1_000;
/// Lines that come while the last ones are read.
const MORE_LINES: usize = 100;

pub struct PodLogs;

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PodLogsInput {
    /// The pod's name or id; may be left out when there is only one.
    #[serde(default)]
    pod: Option<String>,
    /// How many of the last lines; 100 when left out.
    #[schemars(range(min = 1, max = 1000))]
    #[serde(default)]
    tail: Option<u32>,
    /// Instead of tail: lines since then, like `10m` ago or `2026-01-31T12:00:00Z`.
    #[serde(default)]
    since: Option<String>,
    /// Only what the programs in the container print, or what the provider does with it.
    #[serde(default)]
    source: Option<LogSource>,
}

#[derive(Debug, Serialize, JsonSchema)]
pub struct PodLogsOutput {
    pod: String,
    pod_id: String,
    /// Oldest first: time, source, text.
    lines: Vec<String>,
    /// Lines that were read and left out to keep the answer short: the oldest, with `since` the newest.
    cut: usize,
    /// Whether there may be newer lines.
    more: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

impl Tool for PodLogs {
    const NAME: &'static str = "pod_logs";
    const TITLE: &'static str = "Read a pod's logs";
    const DESCRIPTION: &'static str =
        "The last lines that a pod's container printed and that the provider wrote about it.";
    const EFFECT: Effect = Effect::Reads;
    const EXAMPLE: &'static str = r#"{"pod": "comfy", "tail": 50}"#;
    type Input = PodLogsInput;
    type Output = PodLogsOutput;

    async fn run(context: &Context, input: PodLogsInput) -> Result<PodLogsOutput, ToolError> {
        let services = &context.services;
        let query = log_query(input.tail, input.since.as_deref(), input.source)?;
        let (pod, pod_id) = logged_pod(services, input.pod.as_deref()).await?;
        let limits = match query.tail {
            Some(tail) => LogLimits { lines: tail as usize + MORE_LINES, ..LogLimits::default() },
            None => LogLimits::default(),
        };
        let page = services.provider()?.pod_logs(&pod_id, &query, &limits).await.map_err(while_a_pod_runs)?;
        let last_at = page.lines.iter().rev().find_map(|line| line.at);
        let mut lines: Vec<_> = page.lines.iter().map(|line| (line.at, log_line(line))).collect();
        let (mut cut, mut next_since) = (0, last_at);
        if query.since.is_some() {
            let kept = fitting(lines.iter().map(|(_, line)| line));
            cut = lines.len() - kept;
            lines.truncate(kept);
            next_since = lines.iter().rev().find_map(|(at, _)| *at);
        } else {
            let most = query.tail.unwrap_or(DEFAULT_TAIL) as usize;
            let kept = fitting(lines.iter().rev().map(|(_, line)| line)).min(most);
            cut += lines.len() - kept;
            lines.drain(..lines.len() - kept);
        }
        let more = page.more || query.since.is_some() && cut > 0;
        let next =
            next_since.filter(|_| more).map(|at| format!("pod_logs {{\"pod\": \"{pod}\", \"since\": \"{at}\"}}"));
        Ok(PodLogsOutput { pod, pod_id, lines: lines.into_iter().map(|(_, line)| line).collect(), cut, more, next })
    }

    fn text(output: &PodLogsOutput) -> String {
        let mut text = output.lines.join("\n");
        if output.lines.is_empty() {
            text.push_str("No lines.");
        }
        if output.cut > 0 {
            text.push_str(&format!("\n{} lines were left out.", output.cut));
        }
        if let Some(next) = &output.next {
            text.push_str(&format!("\nNext: {next}"));
        }
        text
    }
}

/// The lines that [`PodLogs`] would answer with and every line after them, for the command that follows a pod. It ends
/// when the pod is gone.
pub async fn follow_pod_logs(
    services: &Services,
    arguments: Value,
) -> Result<BoxStream<'static, Result<String, ToolError>>, ToolError> {
    let input: PodLogsInput = decode(arguments)?;
    let query = log_query(input.tail, input.since.as_deref(), input.source)?;
    let (_, pod_id) = logged_pod(services, input.pod.as_deref()).await?;
    let lines = services.provider()?.follow_logs(&pod_id, &query).await.map_err(while_a_pod_runs)?;
    let until_gone = lines.take_while(|line| std::future::ready(!matches!(line, Err(ProviderError::NotFound { .. }))));
    Ok(until_gone.map(|line| line.map(|line| log_line(&line)).map_err(while_a_pod_runs)).boxed())
}

/// The query that these arguments mean.
fn log_query(tail: Option<u32>, since: Option<&str>, source: Option<LogSource>) -> Result<LogQuery, ToolError> {
    if tail.is_some() && since.is_some() {
        return Err(ToolError::invalid("tail", "give either tail or since, not both"));
    }
    let since = since.map(moment).transpose()?;
    let tail = since.is_none().then_some(tail.unwrap_or(DEFAULT_TAIL));
    Ok(LogQuery { source, tail, since })
}

/// A time, or how long ago it was.
fn moment(text: &str) -> Result<Timestamp, ToolError> {
    if let Ok(at) = text.parse() {
        return Ok(at);
    }
    let ago = humantime::parse_duration(text).ok().and_then(|ago| SignedDuration::try_from(ago).ok());
    ago.map(|ago| later(Timestamp::now(), -ago)).ok_or_else(|| {
        ToolError::invalid("since", "expected a duration like `10m`, or a time like `2026-01-31T12:00:00Z`")
    })
}

/// The name and the id of the pod whose logs are asked for.
async fn logged_pod(services: &Services, wanted: Option<&str>) -> Result<(String, String), ToolError> {
    services.provider()?;
    let found = find_or_only(services, wanted).await?;
    match found.pod_id() {
        Some(id) => Ok((found.name.clone(), id.to_owned())),
        None => {
            Err(ToolError::not_found(format!("the pod `{}` is not placed yet, so it has said nothing", found.name))
                .hint(format!("see get_pod {{\"pod\": \"{}\"}}", found.name)))
        }
    }
}

/// How many of these fit into an answer.
fn fitting<'a>(lines: impl Iterator<Item = &'a String>) -> usize {
    let mut chars = 0;
    lines
        .take_while(|line| {
            chars += line.chars().count() + 1;
            chars <= MOST_CHARS
        })
        .count()
}

/// One line as it is shown.
fn log_line(line: &LogLine) -> String {
    let at = line.at.map_or_else(|| "-".to_owned(), |at| format!("{at:.0}"));
    let source = match line.source {
        Some(LogSource::Container) => "container",
        Some(LogSource::System) => "system",
        None => "-",
    };
    let text = plain(&line.text);
    let length = text.chars().count();
    if length <= MOST_CHARS_A_LINE {
        return format!("{at} {source} {text}");
    }
    let kept: String = text.chars().take(MOST_CHARS_A_LINE).collect();
    format!("{at} {source} {kept}… ({} characters more)", length - MOST_CHARS_A_LINE)
}

/// What a terminal would show in the end: without colours, and of a progress bar only its last state.
fn plain(text: &str) -> String {
    let last = text.trim_end_matches(['\r', '\n']).rsplit('\r').next().unwrap_or_default();
    let mut shown = String::with_capacity(last.len());
    let mut chars = last.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' if chars.next_if_eq(&'[').is_some() => {
                // A sequence ends with its first letter or sign past the parameters.
                chars.by_ref().find(|c| ('\u{40}'..='\u{7e}').contains(c));
            }
            '\t' => shown.push(c),
            c if c.is_control() => {}
            c => shown.push(c),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_shown_as_a_terminal_would_in_the_end() {
        assert_eq!(plain("\u{1b}[32mgreen\u{1b}[0m and\tplain\r\n"), "green and\tplain");
        assert_eq!(plain(" 10%|#   |\r 20%|##  |"), " 20%|##  |");
        assert_eq!(plain("a\u{1b}]0;title\u{7}b\u{1b}["), "a]0;titleb");
        let long = LogLine { at: None, source: None, text: "x".repeat(5_000) };
        assert!(log_line(&long).chars().count() < 1_100, "{}", log_line(&long));
    }

    #[test]
    fn times_are_moments_or_ago() {
        let ago = moment("10m").expect("ten minutes ago");
        let seconds = Timestamp::now().duration_since(ago).as_secs();
        assert!((600..660).contains(&seconds), "{seconds}");
        assert_eq!(moment("2026-01-31T12:00:00Z").expect("a time").to_string(), "2026-01-31T12:00:00Z");
        assert!(moment("yesterday").is_err());
        assert!(log_query(Some(1), Some("1m"), None).is_err());
    }

    #[test]
    fn an_answer_has_an_end() {
        let lines = vec!["x".repeat(999); 100];
        assert_eq!(fitting(lines.iter()), 24);
    }
}
