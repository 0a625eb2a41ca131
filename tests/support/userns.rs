//! Whether this machine lets an unprivileged user make namespaces, as commands in a sandbox pod need them.

use std::io::Write;
use std::process::Command;

/// Without them a test of such commands is skipped, which is said, unless `AUTOPOD_TEST_REQUIRE` lists `userns`.
pub fn are_allowed() -> bool {
    let tried = Command::new("unshare").args(["-Urmpf", "--mount-proc", "true"]).output();
    if tried.is_ok_and(|output| output.status.success()) {
        return true;
    }
    let required = std::env::var("AUTOPOD_TEST_REQUIRE").unwrap_or_default();
    assert!(
        !required.split(',').any(|item| item == "userns"),
        "userns is required, but `unshare -Urmpf --mount-proc true` fails"
    );
    // Not `eprintln`, which the test harness would swallow.
    let _ = writeln!(std::io::stderr(), "skipped: there are no user namespaces here for a pod's commands");
    false
}
