//! Every way in which a call fails, what it becomes, and how often it was sent.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use autopod_mcp::errors::chain;
use autopod_mcp::provider::{GpuProvider, PodAction, ProviderError};
use autopod_mcp::runpod::RunPodTimeouts;

use super::script::{KEY, Script, Step, answer, client, impatient, json, problem, quick};
use super::{POD, spec, volume_spec};

/// The documented table: status, whether it may have happened, what it becomes.
#[tokio::test]
async fn each_status_becomes_its_error() {
    type Check = fn(&ProviderError) -> bool;
    let table: &[(u16, bool, Check)] = &[
        (400, false, |e| matches!(e, ProviderError::Refused { detail } if detail == "it was so")),
        (401, false, |e| matches!(e, ProviderError::Unauthorized { detail } if detail == "it was so")),
        (402, false, |e| matches!(e, ProviderError::PaymentRequired { detail } if detail == "it was so")),
        (403, false, |e| matches!(e, ProviderError::Forbidden { detail } if detail == "it was so")),
        (404, false, |e| matches!(e, ProviderError::NotFound { detail, .. } if detail == "it was so")),
        (405, false, |e| matches!(e, ProviderError::Refused { detail } if detail == "HTTP 405: it was so")),
        (408, true, |e| matches!(e, ProviderError::Server { status: 408, .. })),
        (409, false, |e| matches!(e, ProviderError::Conflict { detail } if detail == "it was so")),
        (422, false, |e| matches!(e, ProviderError::Invalid { errors, .. } if errors == &["$.a: no", "{\"b\":1}"])),
        (429, false, |e| matches!(e, ProviderError::RateLimited { retry_after } if retry_after.as_secs() == 10)),
        (500, true, |e| matches!(e, ProviderError::Server { status: 500, detail } if detail == "it was so")),
        (501, true, |e| matches!(e, ProviderError::Server { status: 501, .. })),
        (502, true, |e| matches!(e, ProviderError::Server { status: 502, .. })),
        (503, true, |e| matches!(e, ProviderError::Server { status: 503, .. })),
        (524, true, |e| matches!(e, ProviderError::Server { status: 524, .. })),
    ];
    for (status, may_have_happened, is_expected) in table {
        let body = r#"{"title":"T","status":1,"detail":"it was so","errors":["$.a: no",{"b":1}]}"#;
        let server = Script::start([problem(*status, "", body)]).await;
        let error = server.client().create_pod(&spec()).await.unwrap_err();
        assert!(is_expected(&error), "{status}: {error:?}");
        assert_eq!(error.may_have_happened(), *may_have_happened, "{status}");
        assert_eq!(server.requests().len(), 1, "a POST is sent once, whatever comes: {status}");
    }
}

#[tokio::test]
async fn an_error_without_a_problem_still_has_its_status() {
    let cut = b"HTTP/1.1 402 X\r\nContent-Length: 500\r\n\r\n{\"deta".to_vec();
    let server = Script::start([
        answer(403, "Content-Type: text/html\r\n", "<html>go away</html>"),
        answer(401, "", ""),
        problem(409, "", r#"{"title":"only a title","detail":""}"#),
        problem(409, "", r#"{"detail":{"not":"a text"}}"#),
        Step::Say(cut),
    ])
    .await;
    let client = server.client();
    let mut texts = Vec::new();
    for _ in 0..5 {
        texts.push(client.control_pod("p1", PodAction::Stop).await.unwrap_err().to_string());
    }
    assert!(texts[0].contains("may not do that") && texts[0].contains("HTML page"), "{}", texts[0]);
    assert!(texts[1].contains("refused the API key") && texts[1].contains("401"), "{}", texts[1]);
    assert!(texts[2].contains("only a title"), "{}", texts[2]);
    assert!(texts[3].contains("409"), "{}", texts[3]);
    assert!(texts[4].contains("balance is too low"), "{}", texts[4]);
}

#[tokio::test]
async fn a_long_or_wild_detail_becomes_one_short_line() {
    let detail = format!("\\u001b[31mred\\n{}", "x".repeat(5000));
    let server = Script::start([problem(400, "", &format!(r#"{{"detail":"{detail}"}}"#))]).await;
    let text = server.client().create_pod(&spec()).await.unwrap_err().to_string();
    assert!(text.len() < 700 && text.ends_with('…') && !text.contains(char::is_control), "{text:?}");
}

#[tokio::test]
async fn an_answer_that_breaks_off_may_have_happened() {
    let head = "HTTP/1.1 201 X\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n";
    let server = Script::start([
        Step::Say(format!("{head}{{\"id\":\"p1\"").into_bytes()),
        Step::Say(Vec::new()),
        Step::Say(b"HTTP/1.1 201".to_vec()),
        Step::Reset,
    ])
    .await;
    let client = server.client();
    for sent in 1..=4 {
        let error = client.create_pod(&spec()).await.unwrap_err();
        assert!(matches!(error, ProviderError::Broken { .. }) && error.may_have_happened(), "{sent}: {error:?}");
        assert_eq!(server.requests().len(), sent);
    }
}

#[tokio::test]
async fn a_success_that_can_not_be_read_may_have_happened() {
    let cases = [
        (json(201, r#"{"id":"p1","cost":"a lot"}"#), "`cost`"),
        (json(201, r#"{"name":"no id"}"#), "missing field `id`"),
        (json(201, r#"{"id":"p1""#), "EOF"),
        (json(201, r#"{"id":"p1"} {"id":"p2"}"#), "trailing"),
        (json(201, ""), "EOF"),
        (json(201, r#"{"id":"p1","ssh":{"direct":{"host":"h","port":123456}}}"#), "`ssh.direct.port`"),
        (answer(200, "Content-Type: text/html\r\n", "<html>Welcome to the hotel</html>"), "HTML"),
        (answer(200, "", " \n<!DOCTYPE html>"), "HTML"),
        (answer(302, "Location: http://hotel.example/login\r\n", ""), "http://hotel.example/login"),
        (answer(200, "Content-Type: text/plain\r\n", "it works"), "expected value"),
        (Step::Say(b"HTTP/1.1 200 X\r\nContent-Length: 99999999999\r\n\r\n".to_vec()), "larger than 32 MiB"),
    ];
    for (step, expected) in cases {
        let server = Script::start([step]).await;
        let error = server.client().create_pod(&spec()).await.unwrap_err();
        assert!(matches!(error, ProviderError::Unreadable { .. }) && error.may_have_happened(), "{error:?}");
        assert!(error.to_string().contains(expected), "{error} has no {expected}");
        assert_eq!(server.requests().len(), 1);
    }
}

#[tokio::test]
async fn a_decode_error_in_a_list_names_the_path() {
    let server = Script::start([json(200, r#"{"pods":[{"id":"p1"},{"id":"p2","gpu":{"id":"G","count":-1}}]}"#)]).await;
    let error = server.client().pods().await.unwrap_err();
    assert!(matches!(&error, ProviderError::Unreadable { path, .. } if path == "pods[1].gpu.count"), "{error:?}");
    assert_eq!(server.requests().len(), 1, "an answer that can't be read isn't asked for again");
}

#[tokio::test]
async fn a_body_without_end_is_not_swallowed() {
    let mut endless = b"HTTP/1.1 200 X\r\nContent-Type: application/json\r\n\r\n".to_vec();
    endless.resize(endless.len() + 33 * 1024 * 1024, b' ');
    let server = Script::start([Step::Say(endless)]).await;
    let error = server.client().pods().await.unwrap_err();
    assert!(error.to_string().contains("larger than 32 MiB"), "{error}");
}

#[tokio::test]
async fn a_redirect_is_never_followed_with_the_key() {
    let elsewhere = Script::start([]).await;
    let location = format!("Location: {}/v2/pods\r\n", elsewhere.url);
    let server = Script::start([answer(307, &location, ""), answer(301, &location, "")]).await;
    let client = server.client();
    assert!(matches!(client.create_pod(&spec()).await, Err(ProviderError::Unreadable { .. })));
    assert!(matches!(client.pods().await, Err(ProviderError::Unreadable { .. })));
    assert_eq!((server.requests().len(), elsewhere.requests().len()), (2, 0));
}

#[tokio::test]
async fn a_silent_server_is_a_time_out() {
    let half = b"HTTP/1.1 201 X\r\nContent-Length: 500\r\n\r\n{\"id\":".to_vec();
    let server = Script::start([Step::Hang, Step::Hang, Step::Hang, Step::Hang, Step::Say(half)]).await;
    let client = client(&server.url, impatient());
    let error = client.create_pod(&spec()).await.unwrap_err();
    assert!(matches!(error, ProviderError::TimedOut { after } if after == impatient().create), "{error:?}");
    assert!(error.may_have_happened());
    assert_eq!(server.requests().len(), 1);
    assert!(matches!(client.pods().await, Err(ProviderError::TimedOut { .. })));
    assert_eq!(server.requests().len(), 4);
}

#[tokio::test]
async fn all_attempts_together_are_bounded() {
    let server = Script::start((0..9).map(|_| Step::Hang)).await;
    let total = Duration::from_millis(400);
    let client = client(&server.url, RunPodTimeouts { total, attempts: 9, ..quick() });
    let error = client.pods().await.unwrap_err();
    assert!(matches!(error, ProviderError::TimedOut { after } if after == total), "{error:?}");
    assert_eq!(server.requests().len(), 1);
}

#[tokio::test]
async fn a_refused_connection_sent_nothing() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    let error = client(&url, quick()).create_pod(&spec()).await.unwrap_err();
    assert!(matches!(&error, ProviderError::Unreachable { origin, .. } if *origin == url), "{error:?}");
    assert!(!error.may_have_happened());
    let text = chain(&error);
    assert!(text.contains("refused") && text.matches(&url).count() == 1, "{text}");
}

#[tokio::test]
async fn safe_calls_are_repeated_and_no_others() {
    let flaky = || [problem(503, "", "{}"), Step::Reset, json(200, POD)];
    let server = Script::start(flaky()).await;
    server.client().pod("p1").await.unwrap();
    assert_eq!(server.requests().len(), 3);

    let server = Script::start([problem(500, "", "{}"), answer(204, "", "")]).await;
    server.client().delete_pod("p1").await.unwrap();
    assert_eq!(server.requests().len(), 2);

    let server = Script::start((0..9).map(|_| problem(502, "", "{}"))).await;
    assert!(matches!(server.client().pods().await, Err(ProviderError::Server { status: 502, .. })));
    assert_eq!(server.requests().len(), 3);

    let server = Script::start((0..9).map(|_| problem(501, "", "{}"))).await;
    assert!(matches!(server.client().pods().await, Err(ProviderError::Server { status: 501, .. })));
    assert_eq!(server.requests().len(), 1);

    for status in [400, 401, 402, 403, 404, 409, 422] {
        let server = Script::start([problem(status, "", "{}")]).await;
        server.client().delete_pod("p1").await.unwrap_err();
        assert_eq!(server.requests().len(), 1, "{status} is definite");
    }

    for fault in [|| problem(503, "", "{}"), || problem(429, "Retry-After: 0\r\n", "{}"), || Step::Reset] {
        let server = Script::start((0..9).map(|_| fault())).await;
        let client = server.client();
        client.create_pod(&spec()).await.unwrap_err();
        client.control_pod("p1", PodAction::Start).await.unwrap_err();
        client.create_volume(&volume_spec()).await.unwrap_err();
        client.grow_volume("v1", 200).await.unwrap_err();
        assert_eq!(server.requests().len(), 4);
    }
}

/// A kept connection that dies under a POST is the moment at which HTTP libraries like to send it again, and at which
/// nobody knows whether it arrived.
#[tokio::test]
async fn a_post_never_goes_over_a_kept_connection() {
    let head = format!("HTTP/1.1 200 X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", POD.len());
    let steps = [Step::SayThenReset(format!("{head}{POD}").into_bytes()), json(201, POD), json(201, POD)];
    let server = Script::start(steps).await;
    let client = server.client();
    client.pod("p1").await.unwrap();
    client.create_pod(&spec()).await.unwrap();
    let lines: Vec<_> = server.requests().iter().map(super::script::Request::line).collect();
    assert_eq!(lines, ["GET /v2/pods/p1", "POST /v2/pods"]);
    // The script resets the kept connection under whatever comes second on it: a GET is repeated.
    client.pod("p1").await.unwrap();
    let lines: Vec<_> = server.requests().iter().skip(2).map(super::script::Request::line).collect();
    assert_eq!(lines, ["GET /v2/pods/p1", "GET /v2/pods/p1"]);
}

#[tokio::test]
async fn a_short_retry_after_is_waited_for_and_a_long_one_returned() {
    let server = Script::start([problem(429, "Retry-After: 1\r\n", "{}"), json(200, POD)]).await;
    server.client().pod("p1").await.unwrap();
    assert_eq!(server.requests().len(), 2);

    let cases =
        [("Retry-After: 42\r\n", 42), ("", 10), ("Retry-After: soon\r\n", 10), ("Retry-After: 9999999\r\n", 3600)];
    for (header, seconds) in cases {
        let server = Script::start([problem(429, header, "{}"), json(200, POD)]).await;
        let error = server.client().pod("p1").await.unwrap_err();
        let expected = Duration::from_secs(seconds);
        assert!(matches!(error, ProviderError::RateLimited { retry_after } if retry_after == expected), "{error:?}");
        assert_eq!(server.requests().len(), 1);
    }
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn no_secret_is_ever_shown() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::TRACE);
    let _guard = tracing::subscriber::set_default(subscriber.with_writer(move || writer.clone()).finish());

    let mut spec = spec();
    spec.env.insert("HF_TOKEN".into(), "hf_verysecret".into());
    let echo = format!("you sent {KEY} and hf_verysecret");
    let refusal = format!(r#"{{"detail":"{echo}","errors":["{echo}"]}}"#);
    let odd = format!(r#"{{"id":"p1","cost":"{echo}"}}"#);
    let fine = r#"{"id":"p1","env":{"HF_TOKEN":"hf_verysecret"}}"#;
    let away = format!("Location: https://hotel.example/?token={KEY}\r\n");
    let server = Script::start([
        problem(422, "", &refusal),
        problem(500, "", &refusal),
        json(201, &odd),
        answer(302, &away, ""),
        json(201, fine),
        json(200, &format!(r#"{{"id":"p1","{KEY}":1,"cost":"{KEY}"}}"#)),
    ])
    .await;
    let client = server.client();

    let mut shown = format!("{client:?} {spec:?}");
    for _ in 0..4 {
        let error = client.create_pod(&spec).await.unwrap_err();
        shown += &format!("{error} {error:?} {}", chain(&error));
    }
    shown += &format!("{:?}", client.create_pod(&spec).await.unwrap());
    let error = client.pod("p1").await.unwrap_err();
    shown += &format!("{error} {error:?}");

    let logged = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(logged.contains("method=POST path=/v2/pods status=422"), "{logged}");
    assert!(shown.contains("[redacted]") && shown.contains("HF_TOKEN"), "{shown}");
    for text in [&shown, &logged] {
        assert!(!text.contains(KEY) && !text.contains("hf_verysecret"), "{text}");
    }
}

#[cfg(target_os = "linux")]
const WITHOUT_CERTIFICATES: &str = "runpod_provider::failures::https_without_certificates_says_what_to_install";

/// Runs itself once more as a process whose system has no CA certificates. Other systems keep them elsewhere.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn https_without_certificates_says_what_to_install() {
    if std::env::var_os("SSL_CERT_FILE").is_none_or(|file| file != "/nonexistent/certificates") {
        let output = tokio::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", WITHOUT_CERTIFICATES, "--nocapture"])
            .env("SSL_CERT_FILE", "/nonexistent/certificates")
            .env("SSL_CERT_DIR", "/nonexistent")
            .output()
            .await
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
    let error = client("https://127.0.0.1:1", quick()).create_pod(&spec()).await.unwrap_err();
    assert!(matches!(&error, ProviderError::Setup(text) if text.contains("ca-certificates")), "{error:?}");
    assert!(!error.may_have_happened());
    // Plain http to loopback needs none.
    let server = Script::start([json(200, POD)]).await;
    server.client().pod("p1").await.unwrap();
}

#[tokio::test]
async fn https_to_something_that_is_not_tls_sent_nothing() {
    let server = Script::start([]).await;
    let url = server.url.replace("http://", "https://");
    let connect = Duration::from_millis(300);
    let error = client(&url, RunPodTimeouts { connect, ..quick() }).create_pod(&spec()).await.unwrap_err();
    // This may be a machine without CA certificates.
    let without_certificates = matches!(&error, ProviderError::Setup(text) if text.contains("ca-certificates"));
    assert!(without_certificates || matches!(&error, ProviderError::Unreachable { .. }), "{error:?}");
    assert!(!error.may_have_happened());
    assert_eq!(server.requests().len(), 0);
}
