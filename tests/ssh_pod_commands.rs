//! `pod exec`, `pod cp` and `pod ssh` by the program itself, in a pod of the sandbox.

use std::process::Stdio;

use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::faces_support::TestHome;
use crate::story_support::{Story, said};

#[tokio::test]
async fn people_work_in_a_pod() {
    let story = Story::begin();
    let folder = story.home.folder().to_owned();
    let nobody = story.run(&["pod", "exec", "--", "true"]).await;
    assert_eq!(nobody.code, 3, "{nobody:?}");
    story.call("create_pod_with_volume", json!({"name": "one"})).await.json();
    // It waits for sshd.
    story.call("start_tunnel", json!({"pod": "one", "wait_seconds": 45})).await.json();

    for code in [0, 7, 255] {
        let script = format!("printf '%s\\n' \"$1\"; echo problem >&2; exit {code}");
        let ran = story.run(&["pod", "exec", "one", "--", "sh", "-c", &script, "sh", "it's $HOME  *"]).await;
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (code, "it's $HOME  *\n", "problem\n"));
    }
    let mut child = story.command(&["pod", "exec", "--", "wc", "-c"]).stdin(Stdio::piped()).spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all(&vec![b'x'; 1_000_000]).await.expect("it reads");
    drop(stdin);
    let output = child.wait_with_output().await.expect("it ends");
    assert_eq!((output.status.code(), output.stdout.trim_ascii()), (Some(0), &b"1000000"[..]));
    let late = story.run(&["pod", "exec", "--timeout", "500ms", "--", "sleep", "60"]).await;
    assert_eq!(late.code, 1, "{late:?}");
    late.assert_words(&["did not end within 500ms", "possibly"]);
    let missing = story.run(&["pod", "exec", "two", "--", "true"]).await;
    assert_eq!(missing.code, 3, "{missing:?}");
    assert_eq!(story.run(&["pod", "exec", "one"]).await.code, 2);

    std::fs::create_dir(folder.join("some files")).expect("a folder");
    std::fs::write(folder.join("some files/it's"), "text").expect("a file");
    let sent = story.run(&["pod", "cp", "some files", "one:up load"]).await;
    assert_eq!((sent.code, sent.stdout.as_str()), (0, "Copied to one:up load\n"), "{sent:?}");
    let there = story.run(&["pod", "exec", "one", "--", "cat", "up load/it's"]).await;
    assert_eq!(there.stdout, "text");
    let fetched = story.run(&["pod", "cp", ":up load/it's", "back"]).await;
    assert_eq!(fetched.code, 0, "{fetched:?}");
    assert_eq!(std::fs::read_to_string(folder.join("back")).expect("a file"), "text");
    let fetched = story.run(&["pod", "cp", "one:up load", "."]).await;
    assert_eq!(fetched.code, 0, "{fetched:?}");
    assert_eq!(std::fs::read_to_string(folder.join("up load/it's")).expect("a file"), "text");
    for (arguments, code) in
        [(["one:/no/such", "."], 3), (["no-such", "one:/tmp"], 3), (["a", "b"], 2), (["a", "one:"], 2)]
    {
        let refused = story.run(&["pod", "cp", arguments[0], arguments[1]]).await;
        assert_eq!(refused.code, code, "{arguments:?}: {refused:?}");
    }

    // The sandbox has no shells for people, and says so through the user's own ssh.
    for words in [&["pod", "ssh", "one"][..], &["pod", "shell"], &["ssh"], &["shell", "one"]] {
        let shell = said(story.command(words)).await;
        assert_eq!(shell.code, 1, "{words:?}: {shell:?}");
        shell.assert_words(&["This sandbox pod runs commands"]);
    }
    let connected = story.run(&["connect", "one"]).await;
    assert_eq!(connected.code, 0, "{connected:?}");
    connected.assert_words(&["port 8188 of the pod one"]);
    story.end().await;
}

#[tokio::test]
async fn they_are_listed_in_their_group() {
    let home = TestHome::new();
    let (code, help, _) = home.run(&["pod", "--help"]).await;
    assert_eq!(code, 0);
    for verb in ["list", "create", "ssh", "exec", "cp"] {
        assert!(help.lines().any(|line| line.trim_start().starts_with(&format!("{verb} "))), "{verb}: {help}");
    }
    for words in [&["pod", "exec", "--help"][..], &["pod", "cp", "--help"], &["ssh", "--help"], &["connect", "--help"]]
    {
        assert_eq!(home.run(words).await.0, 0, "{words:?}");
    }
    let (_, help, _) = home.run(&["--help"]).await;
    assert!(!help.lines().any(|line| line.trim_start().starts_with("ssh ")), "{help}");
}
