//! Commands for people, as rows over the tools: the flags come from a tool's input schema, only the rendering is
//! theirs. `--json` gives what `call` gives.
//!
//! A tool's call is bounded to 45 s; a person waits longer. So a command whose tool answers `done: false` goes on
//! until `--timeout`: with the call in the answer's `next`, given as `{"tool": ..., "arguments": ...}` or as the text
//! `TOOL {json}`, or else with the same call again, which is safe because such tools ensure a state.

mod flags;
mod next;
mod rows;

use std::time::{Duration, Instant};

use clap::{Arg, ArgAction, ArgMatches, Command, Subcommand};
use serde_json::{Map, Value, json};

use super::progress::Bar;
use super::signals::interruptible;
use super::{ask, output, paths, pod, render, volume_delete};
use crate::app::{self, AppOptions};
use crate::timing::WAIT_DEFAULT_SECONDS;
use crate::tools::{self, Answer, Context, StillBilling, ToolDef, ToolError};

pub use rows::ROWS;

/// One command.
pub struct Row {
    /// A group and a verb, like `pod list`, or one word.
    pub path: &'static str,
    /// The tool it calls.
    pub tool: &'static str,
    /// The field of the input that is given without a flag.
    pub positional: Option<&'static str>,
    /// A JSON object of fields that the command itself sets, so that they have no flag.
    pub fixed: &'static str,
    /// Fields that mean nothing with what is fixed, so that they have no flag either.
    pub without: &'static [&'static str],
    /// What the help says of it; the tool's title and description when empty.
    pub about: &'static str,
    /// Other ways to write the path, of one word or two; they work but are not listed.
    pub aliases: &'static [&'static str],
    pub render: fn(&Value) -> String,
    /// Whether an answer counts as a success: exit code 0 or 1.
    pub succeeded: fn(&Value) -> bool,
}

/// The field that bounds one call; the command sets it from what is left of `--timeout`.
const WAIT_FIELD: &str = "wait_seconds";
/// Between calls that answer at once.
const LEAST_PAUSE: Duration = Duration::from_secs(1);
const JSON_FLAG: &str = "json";
const TIMEOUT_FLAG: &str = "timeout";

impl Row {
    fn tool(&self) -> Result<&'static ToolDef, ToolError> {
        tools::known(self.tool)
    }

    /// Every way to write it, the one that is listed first.
    fn paths(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.path).chain(self.aliases.iter().copied())
    }

    fn fixed(&self) -> Map<String, Value> {
        serde_json::from_str(self.fixed).unwrap_or_default()
    }
}

/// Adds the rows to the program's other commands. Flags are made from schemas only for the command that is asked for:
/// `serve` has to greet its client within milliseconds.
pub fn add_commands(mut program: Command) -> Command {
    for row in ROWS {
        for path in row.paths() {
            let (name, is_group) = path.split_once(' ').map_or((path, false), |(group, _)| (group, true));
            if program.find_subcommand(name).is_none() {
                let is_listed = is_group || path == row.path;
                let about = match is_group {
                    true => rows::about_group(name),
                    false => row.tool().map_or("", |tool| tool.title),
                };
                program = program.subcommand(Command::new(name).about(about).hide(!is_listed).defer(fill));
            }
        }
    }
    program.subcommands(pod::aliases())
}

/// Gives a group its verbs, and an alias of one word its flags.
fn fill(mut command: Command) -> Command {
    let name = command.get_name().to_owned();
    for row in ROWS {
        for path in row.paths() {
            command = match path.split_once(' ') {
                None if path == name => add_flags(command, row),
                Some((group, verb)) if group == name => command
                    .subcommand_required(true)
                    .arg_required_else_help(true)
                    .subcommand(add_flags(Command::new(verb), row).hide(path != row.path)),
                _ => command,
            };
        }
    }
    // No rows, for no tools stand behind them.
    match name.as_str() {
        pod::GROUP => pod::PodCommand::augment_subcommands(command),
        volume_delete::GROUP => command.subcommand(volume_delete::command()),
        _ => command,
    }
}

fn add_flags(command: Command, row: &Row) -> Command {
    let Ok(tool) = row.tool() else { return command };
    let (about, long_about) = match row.about {
        "" => (tool.title, in_commands(tool.description)),
        about => (about, format!("{about}\n\n{}", in_commands(tool.description))),
    };
    let mut command = command
        .about(about)
        .long_about(long_about)
        .args(flags::of(row, tool))
        .arg(Arg::new(JSON_FLAG).long(JSON_FLAG).action(ArgAction::SetTrue).help("Print the answer as JSON"));
    if waits(tool) {
        command = command.arg(
            Arg::new(TIMEOUT_FLAG)
                .long(TIMEOUT_FLAG)
                .value_name("DURATION")
                .value_parser(humantime::parse_duration)
                .default_value("30min")
                .help("How long to wait until it is done, like 90s or 2h; the work goes on after that"),
        );
    }
    command
}

/// A tool's words with commands in place of the tools that they name.
fn in_commands(words: &str) -> String {
    ROWS.iter().fold(words.to_owned(), |words, row| words.replace(row.tool, &commands_of(row.tool)))
}

/// The commands over a tool.
fn commands_of(tool: &str) -> String {
    // Beside its tool it can follow, so it is no row.
    let others = [("pod_logs", "pod logs")].into_iter();
    let all = ROWS.iter().map(|row| (row.tool, row.path)).chain(others);
    all.filter(|(name, _)| *name == tool).map(|(_, path)| format!("`{path}`")).collect::<Vec<_>>().join(", ")
}

/// Whether the tool may answer before it is done.
fn waits(tool: &ToolDef) -> bool {
    (tool.output_schema)().pointer("/properties/done").is_some()
}

/// The row that was asked for, and its flags.
pub fn find(matches: &ArgMatches) -> Option<(&'static Row, &ArgMatches)> {
    let (first, matches) = matches.subcommand()?;
    let (path, matches) = match matches.subcommand() {
        Some((second, matches)) => (format!("{first} {second}"), matches),
        None => (first.to_owned(), matches),
    };
    let row = ROWS.iter().find(|row| row.paths().any(|other| other == path))?;
    Some((row, matches))
}

/// What to do next as commands, where a person reads it.
pub fn for_people(error: ToolError) -> ToolError {
    ToolError { hint: error.hint.as_deref().map(next::as_commands), ..error }
}

pub async fn run(options: &AppOptions, row: &'static Row, matches: &ArgMatches) -> Result<u8, ToolError> {
    let tool = row.tool()?;
    let mut arguments = Value::Object(flags::arguments(row, tool, matches)?);
    paths::complete(tool, &mut arguments)?;
    let timeout = matches.try_get_one::<Duration>(TIMEOUT_FLAG).ok().flatten().copied();
    let (last_tool, answer) = {
        let bar = Bar::start();
        interruptible(async {
            let (progress, ask) = (bar.progress(), ask::at_terminal(&bar));
            let context = Context { progress, ask, ..Context::new(app::services(options).await?) };
            until_done(|tool, arguments| tools::call(&context, tool.name, arguments), tool, arguments, timeout).await
        })
        .await
        .map_err(for_people)?
    };
    if matches.get_flag(JSON_FLAG) {
        output::say_json(&answer.value)?;
    } else {
        output::say(&shown(row, last_tool, &answer));
    }
    if is_done(&answer.value) {
        return Ok(if (row.succeeded)(&answer.value) { 0 } else { 1 });
    }
    Err(not_done(last_tool, &answer.value, timeout))
}

/// The tool that answered last, and its answer; not done only when the time is up.
async fn until_done<C: Future<Output = Result<Answer, ToolError>>>(
    call: impl Fn(&'static ToolDef, Value) -> C,
    mut tool: &'static ToolDef,
    mut arguments: Value,
    timeout: Option<Duration>,
) -> Result<(&'static ToolDef, Answer), ToolError> {
    let started = Instant::now();
    let mut created = None;
    let left = || timeout.unwrap_or_default().saturating_sub(started.elapsed());
    loop {
        let call_started = Instant::now();
        if timeout.is_some() && (tool.input_schema)().pointer("/properties/wait_seconds").is_some() {
            arguments[WAIT_FIELD] = json!(left().as_secs().min(WAIT_DEFAULT_SECONDS));
        }
        let mut answer = call(tool, arguments.clone()).await?;
        // What the first call made is there already for the next one, but it was this command that made it.
        if let Some(now) = answer.value.get_mut("created") {
            *now = created.get_or_insert_with(|| now.clone()).clone();
        }
        if is_done(&answer.value) || left().is_zero() {
            return Ok((tool, answer));
        }
        if let Some(next) = next_call(&answer.value) {
            (tool, arguments) = next;
        }
        let pause = LEAST_PAUSE.saturating_sub(call_started.elapsed()).min(left());
        tokio::time::sleep(pause).await;
    }
}

fn is_done(answer: &Value) -> bool {
    answer.get("done") != Some(&Value::Bool(false))
}

/// The call that goes on with the work, where the answer names one that can be made.
fn next_call(answer: &Value) -> Option<(&'static ToolDef, Value)> {
    let (name, arguments) = match answer.get("next")? {
        Value::String(text) => {
            let (name, arguments) = text.split_once(' ')?;
            (name, serde_json::from_str(arguments).ok()?)
        }
        next => (next.get("tool")?.as_str()?, next.get("arguments").cloned().unwrap_or_else(|| json!({}))),
    };
    let tool = tools::find(name)?;
    tool.check(Value::clone(&arguments)).ok()?;
    Some((tool, arguments))
}

/// [`next_call`] as a person types it: the same command again would begin the work anew.
fn next_command(answer: &Value) -> Option<String> {
    let (tool, arguments) = next_call(answer)?;
    next::command(tool, arguments.as_object()?)
}

/// In the row's words, or in those of the row of the tool that answered, or else in the tool's own.
fn shown(row: &Row, answered: &ToolDef, answer: &Answer) -> String {
    let rows = std::iter::once(row).chain(ROWS);
    match rows.into_iter().find(|row| row.tool == answered.name) {
        Some(row) => (row.render)(&answer.value),
        None => render::clean(&answer.text),
    }
}

fn not_done(tool: &ToolDef, answer: &Value, timeout: Option<Duration>) -> ToolError {
    let waited = humantime::format_duration(timeout.unwrap_or_default());
    let waiting_for = answer.get("waiting_for").map(|what| format!(", waiting for {}", render::text(what)));
    let mut error = ToolError::failed(format!(
        "{}: not done within {waited}{}; the work goes on",
        tool.name,
        render::clean(&waiting_for.unwrap_or_default())
    ))
    .hint(match next_command(answer) {
        Some(command) => format!("go on waiting with `{command}`"),
        None => "run the same command again to go on waiting".to_owned(),
    });
    error.still_billing = match answer.get("still_billing").and_then(Value::as_str) {
        Some("yes") => Some(StillBilling::Yes),
        Some("no") => Some(StillBilling::No),
        Some(_) => Some(StillBilling::Possible),
        None => None,
    };
    error
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Answers these in turn and the last one for ever; tells what was asked for.
    async fn asked_for(answers: &[Value], timeout: Option<Duration>) -> (Vec<(&'static str, Value)>, Value) {
        let asked = RefCell::new(Vec::new());
        let call = |tool: &'static ToolDef, arguments: Value| {
            let turn = asked.borrow().len().min(answers.len() - 1);
            asked.borrow_mut().push((tool.name, arguments));
            std::future::ready(Ok(Answer { value: answers[turn].clone(), text: String::new() }))
        };
        let tool = tools::find("list_gpus").expect("it is there");
        let (_, answer) = until_done(call, tool, json!({"gpu_count": 2}), timeout).await.expect("no call failed");
        (asked.into_inner(), answer.value)
    }

    #[tokio::test]
    async fn a_done_answer_or_one_without_states_is_the_last() {
        for answer in [json!({"gpus": []}), json!({"done": true})] {
            let (asked, last) = asked_for(std::slice::from_ref(&answer), Some(Duration::from_secs(60))).await;
            assert_eq!((asked.len(), last), (1, answer));
        }
    }

    #[tokio::test]
    async fn the_call_is_repeated_or_the_next_one_made_until_done() {
        let answers = [
            json!({"done": false, "next": "wait a little"}),
            json!({"done": false, "next": "list_volumes {}"}),
            json!({"done": false, "next": {"tool": "list_gpus", "arguments": {"gpu_count": 3}}}),
            json!({"done": true}),
        ];
        let (asked, last) = asked_for(&answers, Some(Duration::from_secs(60))).await;
        let wanted = [
            ("list_gpus", json!({"gpu_count": 2})),
            ("list_gpus", json!({"gpu_count": 2})),
            ("list_volumes", json!({})),
            ("list_gpus", json!({"gpu_count": 3})),
        ];
        assert_eq!((asked.as_slice(), last), (wanted.as_slice(), json!({"done": true})));
    }

    #[tokio::test]
    async fn the_time_runs_out() {
        let waiting = json!({"done": false, "waiting_for": "an ssh server", "still_billing": "yes"});
        let timeout = Some(Duration::from_millis(10));
        let (asked, last) = asked_for(std::slice::from_ref(&waiting), timeout).await;
        assert!(!asked.is_empty() && last == waiting, "{asked:?}");
        let error = not_done(tools::find("list_gpus").expect("it is there"), &waiting, timeout);
        assert_eq!((error.kind.exit_code(), error.still_billing), (1, Some(StillBilling::Yes)));
        assert!(error.message.contains("an ssh server") && error.message.contains("10ms"), "{error}");
    }

    #[test]
    fn a_call_is_told_as_the_command_that_does_the_same() {
        let next = |action: &str| {
            let call = format!("control_pod {{\"pod\": \"comfy\", \"action\": \"{action}\"}}");
            next_command(&json!({"done": false, "next": call}))
        };
        assert_eq!(next("start").as_deref(), Some("pod start comfy"));
        assert_eq!(next("stop").as_deref(), Some("pod stop comfy"));
    }

    #[test]
    fn only_a_call_that_can_be_made_is_next() {
        for next in [json!(null), json!("again"), json!("no_such_tool {}"), json!("list_gpus {\"colour\": 1}")] {
            assert!(next_call(&json!({"done": false, "next": next})).is_none(), "{next}");
        }
    }
}
