//! The socket on which ComfyUI tells how a run goes, as a stream of events. It is only ever a help: nothing is
//! replayed, there is no heartbeat, and after a reconnect it may stay silent for ever. So it is pinged, opened again
//! when it breaks, and nobody may wait for it alone.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use reqwest::header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use reqwest::{Method, StatusCode, Upgraded};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::{client::generate_key, derive_accept_key};
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};
use tokio_util::task::AbortOnDropHandle;

use super::types::parse_python_json;
use super::{Call, ComfyClient, ComfyError};

/// The largest message; previews are pictures of this order.
const MAX_MESSAGE: usize = 32 << 20;
/// The longest wait between two attempts to open the socket again.
const MAX_BACK_OFF: Duration = Duration::from_secs(10);

type Socket = WebSocketStream<Upgraded>;

/// `{"type": kind, "data": data}`
#[derive(Debug)]
pub(super) struct Event {
    pub kind: String,
    pub data: Value,
}

/// The events of one client id. Dropping it closes the socket.
#[derive(Debug)]
pub(super) struct Events {
    received: mpsc::Receiver<Event>,
    _listener: AbortOnDropHandle<()>,
}

impl Events {
    /// Tries to connect once before it returns, so that a submit after it misses nothing; a failure isn't an error,
    /// for the listener goes on trying.
    pub async fn open(client: &ComfyClient, client_id: &str) -> Self {
        let first = connect(client, client_id).await.inspect_err(|error| note(client, error)).ok();
        let (events, received) = mpsc::channel(256);
        let listener = listen(client.clone(), client_id.to_owned(), first, events);
        Self { received, _listener: AbortOnDropHandle::new(tokio::spawn(listener)) }
    }

    /// Never returns when there is nothing more to hear. Cancel-safe.
    pub async fn next(&mut self) -> Event {
        match self.received.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

fn note(client: &ComfyClient, error: &dyn std::error::Error) {
    tracing::debug!(address = client.address(), %error, "no socket to ComfyUI, going on by polling");
}

/// The same client id is used again: the server then says at once which node runs. Where that leaves the socket
/// deaf, nothing is lost beyond what having no socket would lose.
async fn listen(client: ComfyClient, client_id: String, first: Option<Socket>, events: mpsc::Sender<Event>) {
    let mut socket = first;
    let mut back_off = client.timeouts().poll;
    loop {
        if let Some(socket) = socket.take() {
            back_off = client.timeouts().poll;
            match hear(socket, client.timeouts().ping, &events).await {
                Ok(()) => return,
                Err(error) => note(&client, &error),
            }
        }
        tokio::time::sleep(back_off).await;
        back_off = (back_off * 2).min(MAX_BACK_OFF);
        socket = connect(&client, &client_id).await.inspect_err(|error| note(&client, error)).ok();
    }
}

/// Hands on every event until the socket breaks; `Ok` when nobody wants them any more.
async fn hear(
    mut socket: Socket,
    ping: Duration,
    events: &mpsc::Sender<Event>,
) -> Result<(), tokio_tungstenite::tungstenite::Error> {
    use tokio_tungstenite::tungstenite::Error;
    let mut pings = tokio::time::interval(ping);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        tokio::select! {
            message = socket.next() => {
                heard = Instant::now();
                match message {
                    None | Some(Ok(Message::Close(_))) => return Err(Error::ConnectionClosed),
                    Some(Err(error)) => return Err(error),
                    Some(Ok(Message::Text(text))) => {
                        if let Some(event) = Event::parse(text.as_bytes()) && events.send(event).await.is_err() {
                            return Ok(());
                        }
                    }
                    // Binary frames are previews.
                    Some(Ok(_)) => {}
                }
            }
            _ = pings.tick() => {
                if heard.elapsed() > ping * 3 {
                    return Err(Error::ConnectionClosed);
                }
                let sent = tokio::time::timeout(ping, socket.send(Message::Ping(Default::default())));
                sent.await.unwrap_or(Err(Error::ConnectionClosed))?;
            }
        }
    }
}

impl Event {
    fn parse(text: &[u8]) -> Option<Self> {
        let mut message = parse_python_json(text).ok()?;
        let kind = message.get("type")?.as_str()?.to_owned();
        Some(Self { kind, data: message.get_mut("data")?.take() })
    }
}

/// An upgrade of a connection of the same HTTP client, so that certificates, proxies and the lack of an `Origin` are
/// the same for both.
async fn connect(client: &ComfyClient, client_id: &str) -> Result<Socket, ComfyError> {
    let timeout = client.timeouts().request;
    let call = Call::new(Method::GET, client.url(&["ws"], &[("clientId", client_id)]), timeout);
    let name = call.name();
    let key = generate_key();
    let unusable = |reason: &str| ComfyError::Unreadable {
        call: name.clone(),
        path: "the handshake of the socket".into(),
        reason: reason.to_owned(),
    };
    let handshake = async {
        let response = client.send(call, |request| {
            request
                .header(CONNECTION, "Upgrade")
                .header(UPGRADE, "websocket")
                .header(SEC_WEBSOCKET_VERSION, "13")
                .header(SEC_WEBSOCKET_KEY, &key)
        });
        let response = response.await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(unusable(&format!("HTTP {} instead of 101", response.status().as_u16())));
        }
        let accept = response.headers().get(SEC_WEBSOCKET_ACCEPT);
        if accept.is_none_or(|accept| accept.as_bytes() != derive_accept_key(key.as_bytes()).as_bytes()) {
            return Err(unusable("it was not accepted with our key"));
        }
        let upgraded = response.upgrade().await;
        upgraded.map_err(|error| ComfyError::from_reqwest(error, &name, client.address(), timeout))
    };
    let late = |_| ComfyError::TimedOut { call: name.clone(), after: timeout };
    let upgraded = tokio::time::timeout(timeout, handshake).await.map_err(late)??;
    let config = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
    Ok(WebSocketStream::from_raw_socket(upgraded, Role::Client, Some(config)).await)
}
