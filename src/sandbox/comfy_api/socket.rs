//! `/ws`: who is connected, and events to them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::body::Bytes;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Query, State};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::{Comfy, routes};

/// Events kept for a client that is slow to read; beyond it the client hears nothing more.
const MOST_UNREAD: usize = 4096;
/// The binary frame type of a preview picture.
const PREVIEW_IMAGE: u32 = 1;
/// The picture format named inside of such a frame.
const PREVIEW_PNG: u32 = 2;

#[derive(Default)]
pub struct Sockets {
    clients: Mutex<HashMap<String, mpsc::Sender<Message>>>,
}

impl Sockets {
    /// Sends an event to one client, or to everyone. A client that is not connected misses it: nothing is replayed.
    pub fn send(&self, event: &str, data: Value, client: Option<&str>) {
        self.send_message(Message::text(json!({ "type": event, "data": data }).to_string()), client);
    }

    /// Sends a preview picture (PNG).
    pub fn send_preview(&self, png: &[u8], client: Option<&str>) {
        let frame = [&PREVIEW_IMAGE.to_be_bytes(), &PREVIEW_PNG.to_be_bytes(), png].concat();
        self.send_message(Message::Binary(Bytes::from(frame)), client);
    }

    fn send_message(&self, message: Message, client: Option<&str>) {
        let mut clients = self.clients();
        match client {
            Some(id) => {
                if let Some(sender) = clients.get(id)
                    && sender.try_send(message).is_err()
                {
                    clients.remove(id);
                }
            }
            None => clients.retain(|_, sender| sender.try_send(message.clone()).is_ok()),
        }
    }

    fn clients(&self) -> MutexGuard<'_, HashMap<String, mpsc::Sender<Message>>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Deserialize)]
pub struct Client {
    #[serde(rename = "clientId", default)]
    id: String,
}

pub async fn connect(State(comfy): State<Arc<Comfy>>, Query(client): Query<Client>, up: WebSocketUpgrade) -> Response {
    up.on_upgrade(move |socket| converse(comfy, client.id, socket))
}

async fn converse(comfy: Arc<Comfy>, id: String, mut socket: WebSocket) {
    let id = if id.is_empty() { Uuid::new_v4().simple().to_string() } else { id };
    let (sender, mut events) = mpsc::channel(MOST_UNREAD);
    // An earlier socket of the same client stays open and hears nothing more.
    comfy.sockets.clients().insert(id.clone(), sender.clone());
    comfy.sockets.send("status", json!({ "status": comfy.queue.status(), "sid": id }), Some(&id));
    let current = comfy.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some((client, node)) = current
        && client == id
    {
        comfy.sockets.send("executing", json!({ "node": node }), Some(&id));
    }
    let mut first = true;
    loop {
        tokio::select! {
            event = events.recv() => {
                let Some(message) = event else { break };
                if socket.send(message).await.is_err() {
                    break;
                }
            }
            received = socket.recv() => match received {
                Some(Ok(Message::Text(text))) => {
                    if std::mem::take(&mut first) && is_feature_flags(&text) {
                        comfy.sockets.send("feature_flags", routes::features(), Some(&id));
                    }
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => break,
            },
            () = comfy.stop.cancelled() => break,
        }
    }
    // By the client's id, whichever socket has it now: so ComfyUI makes a client deaf that connected again before its
    // old socket was gone.
    comfy.sockets.clients().remove(&id);
    drop(sender);
}

fn is_feature_flags(text: &str) -> bool {
    serde_json::from_str::<Value>(text).is_ok_and(|message| message["type"] == "feature_flags")
}
