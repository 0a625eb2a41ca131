//! The keeper's ear: JSON lines over a 0600 socket in the home.

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use secrecy::SecretString;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use super::Keeper;
use crate::background::{Hello, Request, account_of, refuse_foreign_folder, socket_path, version};
use crate::config::Home;
use crate::errors::chain;
use crate::state::{self, StateError};

/// A line holds a key at most.
const MOST_LINE_BYTES: u64 = 64 * 1024;
const LISTENED_FOR_AGAIN: Duration = Duration::from_secs(1);

/// Listens, and tries again while that can't be: pods are kept whether anybody can speak to us or not.
pub(super) fn serve(keeper: Arc<Keeper>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let listener = loop {
            match listen(&keeper.home) {
                Ok(listener) => break listener,
                Err(error) => tracing::error!(error = %chain(&error), "nobody can speak to the keeper yet"),
            }
            tokio::time::sleep(LISTENED_FOR_AGAIN).await;
        };
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let talk = answer(keeper.clone(), stream);
                    tokio::spawn(tokio::time::timeout(Duration::from_secs(5), talk));
                }
                // Out of file descriptors, say: not a reason to stop listening.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    })
}

fn listen(home: &Home) -> Result<UnixListener, StateError> {
    let path = socket_path(home);
    let failed = |source| StateError::Io { path: path.clone(), doing: "listened on", source };
    if let Some(folder) = path.parent() {
        state::make_private_folder(folder)?;
    }
    // A folder outside the home could have been made by somebody else before us.
    refuse_foreign_folder(&path).map_err(failed)?;
    // We hold the keeper's lock, so a socket that lies here is a dead one's.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).map_err(failed)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

async fn answer(keeper: Arc<Keeper>, stream: UnixStream) {
    let mut line = String::new();
    let mut reader = BufReader::new(stream.take(MOST_LINE_BYTES));
    if reader.read_line(&mut line).await.is_err() {
        return;
    }
    let reply = match serde_json::from_str::<Request>(&line) {
        Ok(Request::Hello) => serde_json::to_string(&keeper.hello()).unwrap_or_default(),
        Ok(Request::Key { key }) => {
            let key = SecretString::from(key);
            keeper.account.send_replace(Some(account_of(&keeper.origin, &key)));
            keeper.provider.send_replace(Some((keeper.connect)(key.clone())));
            (keeper.on_key)(key);
            keeper.pods_may_be_lost.send_replace(true);
            keeper.turn.send_modify(|turn| *turn += 1);
            "{}".to_owned()
        }
        Ok(Request::LookForPods) => {
            keeper.pods_may_be_lost.send_replace(true);
            "{}".to_owned()
        }
        Ok(Request::Wake) => {
            keeper.turn.send_modify(|turn| *turn += 1);
            "{}".to_owned()
        }
        Ok(Request::Retire) => {
            keeper.retire.cancel();
            "{}".to_owned()
        }
        Err(error) => {
            tracing::warn!(%error, "a line on the socket can't be read");
            r#"{"error":"unknown request"}"#.to_owned()
        }
    };
    let stream = reader.get_mut().get_mut();
    let _ = stream.write_all(format!("{reply}\n").as_bytes()).await;
}

impl Keeper {
    fn hello(&self) -> Hello {
        Hello {
            pid: std::process::id(),
            version: version::OURS.to_owned(),
            has_key: self.provider.borrow().is_some(),
            account: self.account.borrow().clone(),
            origin: self.origin.clone(),
            is_ending: self.retire.is_cancelled() || self.stop.is_cancelled(),
            loop_age_ms: u64::try_from(self.last_turn.borrow().elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }
}
