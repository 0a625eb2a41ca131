//! A pod's log: read to its limits, followed across connections that break.

use std::time::Duration;

use autopod_mcp::provider::{GpuProvider, LogLimits, LogQuery, LogSource, ProviderError};
use futures_util::StreamExt;

use super::script::{Request, Script, Step, answer, problem};

/// An event as the provider writes it.
fn event(id: &str, text: &str) -> String {
    let at = id.split('/').next().unwrap();
    format!("id: {id}\ndata: {{\"ts\":\"{at}\",\"source\":\"container\",\"line\":\"{text}\"}}\n\n")
}

fn head() -> String {
    "HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\n\r\n".to_owned()
}

fn held(events: &[String]) -> Step {
    Step::SayAndHold(format!("{}: hello\n\n{}", head(), events.concat()).into_bytes())
}

fn ended(events: &[String]) -> Step {
    answer(200, "Content-Type: text/event-stream\r\n", &events.concat())
}

fn quickly() -> LogLimits {
    LogLimits { quiet: Duration::from_millis(200), ..LogLimits::default() }
}

fn lines(count: usize) -> Vec<String> {
    (0..count).map(|n| event(&format!("2026-11-06T08:00:{n:02}Z/{n}"), &format!("line {n}"))).collect()
}

#[tokio::test]
async fn a_log_is_read_until_the_pod_is_quiet() {
    let server = Script::start([held(&lines(3)), ended(&[])]).await;
    let client = server.client();
    let query = LogQuery { source: Some(LogSource::Container), tail: Some(9999), since: None };
    let page = client.pod_logs("p1", &query, &quickly()).await.unwrap();
    let texts: Vec<_> = page.lines.iter().map(|line| line.text.as_str()).collect();
    assert_eq!((texts.as_slice(), page.more), (["line 0", "line 1", "line 2"].as_slice(), false));
    assert_eq!(page.lines[1].at, "2026-11-06T08:00:01Z".parse().ok());
    let since = LogQuery { tail: Some(5), since: page.lines[2].at, source: None };
    assert!(client.pod_logs("p1", &since, &quickly()).await.unwrap().lines.is_empty());
    let sent: Vec<_> = server.requests().iter().map(Request::line).collect();
    assert_eq!(sent[0], "GET /v2/pods/p1/logs?source=container&tail=5000");
    assert_eq!(sent[1], "GET /v2/pods/p1/logs?since=2026-11-06T08%3A00%3A02Z");
}

#[tokio::test]
async fn a_log_is_read_to_its_limits() {
    let server = Script::answering(|_| held(&lines(9))).await;
    let client = server.client();
    let page = async |limits| client.pod_logs("p1", &LogQuery::default(), &limits).await.unwrap();
    let few = page(LogLimits { lines: 4, ..quickly() }).await;
    assert_eq!((few.lines.len(), few.more), (4, true));
    let exact = page(LogLimits { lines: 9, ..quickly() }).await;
    assert_eq!((exact.lines.len(), exact.more), (9, false));
    let short = page(LogLimits { bytes: 15, ..quickly() }).await;
    assert_eq!((short.lines.len(), short.lines[2].text.as_str(), short.more), (3, "lin", true));
    let hasty = page(LogLimits { quiet: Duration::from_secs(9), time: Duration::from_millis(300), ..quickly() }).await;
    assert_eq!((hasty.lines.len(), hasty.more), (9, true));
}

#[tokio::test]
async fn a_log_that_can_not_be_had_is_an_error() {
    let steps = [problem(404, "", "{}"), problem(403, "", "{}"), answer(200, "Content-Type: text/html\r\n", "<html>")];
    let broken = Step::Say(
        format!("{}id: a\ndata: {{\"li", head().replace("\r\n\r\n", "\r\nContent-Length: 99\r\n\r\n")).into(),
    );
    let server = Script::start(steps.into_iter().chain([broken, Step::Hang])).await;
    let client = server.client();
    let mut errors = Vec::new();
    for _ in 0..4 {
        errors.push(client.pod_logs("p1", &LogQuery::default(), &quickly()).await.unwrap_err());
    }
    assert!(matches!(errors[0], ProviderError::NotFound { what: "pod", .. }), "{errors:?}");
    assert!(matches!(errors[1], ProviderError::Forbidden { .. }), "{errors:?}");
    assert!(matches!(errors[2], ProviderError::Unreadable { .. }), "{errors:?}");
    assert!(matches!(errors[3], ProviderError::Broken { .. }), "{errors:?}");
}

#[tokio::test]
async fn following_goes_on_where_it_broke_and_repeats_no_line() {
    let all = lines(5);
    let same_moment = [event("2026-11-06T08:00:09Z", "first"), event("2026-11-06T08:00:09Z", "second")];
    let server = Script::start([
        ended(&all[..2]),
        problem(503, "", "{}"),
        Step::Reset,
        // Begins again with the line that was told last.
        ended(&all[1..4]),
        ended(&same_moment[..1]),
        ended(&same_moment),
        problem(404, "", r#"{"detail":"it is gone"}"#),
    ])
    .await;
    let query = LogQuery { tail: Some(2), ..LogQuery::default() };
    let mut stream = server.client().follow_logs("p1", &query).await.unwrap();
    let mut texts = Vec::new();
    let error = loop {
        match stream.next().await.expect("an error is the last item") {
            Ok(line) => texts.push(line.text),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ProviderError::NotFound { .. }), "{error:?}");
    assert!(stream.next().await.is_none());
    assert_eq!(texts, ["line 0", "line 1", "line 2", "line 3", "first", "second"]);
    let resumed: Vec<_> =
        server.requests().iter().map(|request| request.header("last-event-id").map(str::to_owned)).collect();
    let (second, fourth) = (Some("2026-11-06T08:00:01Z/1".to_owned()), Some("2026-11-06T08:00:03Z/3".to_owned()));
    let last = Some("2026-11-06T08:00:09Z".to_owned());
    assert_eq!(resumed, [None, second.clone(), second.clone(), second, fourth, last.clone(), last]);
}

#[tokio::test]
async fn following_a_pod_that_is_not_there_fails_at_once() {
    let server = Script::start([problem(404, "", "{}")]).await;
    let followed = server.client().follow_logs("p1", &LogQuery::default()).await;
    assert!(matches!(followed.err(), Some(ProviderError::NotFound { .. })));
}
