//! `/_proxy/{podId}-{port}/...` stands for `https://{podId}-{port}.proxy.runpod.net/...`: public, without a key, and only
//! for ports that the pod exposed as `PORT/http`. WebSockets pass.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{StatusCode, Uri, Version, header};
use axum::response::{IntoResponse, Response};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;

use super::world::World;

/// RunPod's own limit, after which it answers 524.
const TIME_LIMIT: Duration = Duration::from_secs(100);

/// The root of a port's pages.
pub async fn handle_root(state: State<Arc<World>>, Path(target): Path<String>, request: Request) -> Response {
    handle(state, Path((target, String::new())), request).await
}

pub async fn handle(
    State(world): State<Arc<World>>,
    Path((target, _)): Path<(String, String)>,
    request: Request,
) -> Response {
    let Some((pod, port)) = target.rsplit_once('-').and_then(|(pod, port)| Some((pod, port.parse::<u16>().ok()?)))
    else {
        return plain(StatusCode::NOT_FOUND, "the address is /_proxy/{podId}-{port}/");
    };
    let container = {
        let state = world.state().await;
        match state.pod(pod).filter(|pod| pod.exposes(port, true)) {
            Some(pod) => pod.container.clone(),
            None => return plain(StatusCode::NOT_FOUND, "no such pod, or it doesn't expose this port"),
        }
    };
    let stream = match container {
        Some(container) => container.connect(port).await,
        None => None,
    };
    let Some(stream) = stream else { return plain(StatusCode::BAD_GATEWAY, "nothing listens on this port yet") };
    let prefix = format!("/_proxy/{target}");
    match tokio::time::timeout(TIME_LIMIT, forward(TokioIo::new(stream), request, &prefix)).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => plain(StatusCode::BAD_GATEWAY, &format!("the pod's answer can't be read: {error}")),
        Err(_) => plain(StatusCode::from_u16(524).unwrap_or(StatusCode::GATEWAY_TIMEOUT), "a timeout occurred"),
    }
}

async fn forward(
    stream: TokioIo<tokio::io::DuplexStream>,
    mut request: Request,
    prefix: &str,
) -> Result<Response, hyper::Error> {
    let (mut sender, connection) = http1::handshake(stream).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a proxied connection broke");
        }
    });
    let rest = request.uri().path_and_query().map_or("", |whole| whole.as_str()).strip_prefix(prefix).unwrap_or("");
    let inner = if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") };
    *request.uri_mut() = inner.parse().unwrap_or_else(|_| Uri::from_static("/"));
    *request.version_mut() = Version::HTTP_11;
    // The key is RunPod's business; the app behind the proxy must not see it.
    request.headers_mut().remove(header::AUTHORIZATION);
    let outer = hyper::upgrade::on(&mut request);
    let mut response = sender.send_request(request).await?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let inner = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            let (Ok(outer), Ok(inner)) = tokio::join!(outer, inner) else { return };
            if let Err(error) = copy_bidirectional(&mut TokioIo::new(outer), &mut TokioIo::new(inner)).await {
                tracing::debug!(%error, "a proxied WebSocket broke");
            }
        });
    }
    Ok(response.map(Body::new))
}

fn plain(status: StatusCode, text: &str) -> Response {
    (status, text.to_owned()).into_response()
}
