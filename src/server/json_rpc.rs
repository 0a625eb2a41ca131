//! JSON-RPC 2.0 over HTTP and WebSocket on one port: the only file that names jsonrpsee. Each tool is a method with
//! named parameters; `rpc.discover` describes them all.
//!
//! A port of this machine is open to every program on it and, by DNS rebinding, to every page in its browser. So a
//! request needs the token from a file that only the user can read, a `Host` that is this machine, and no foreign
//! `Origin`.

use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use jsonrpsee::server::{RpcModule, ServerConfig, stop_channel};
use jsonrpsee::types::{ErrorObjectOwned, Params};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{LazyServices, catalog};
use crate::config::refuse_open_file;
use crate::state;
use crate::tools::{self, Context, ErrorKind, Offer, TOOLS, ToolError};

/// The longest request, in bytes; as long as a line of the MCP server.
const LONGEST_REQUEST: u32 = 8 * 1024 * 1024;
const SHORTEST_TOKEN: usize = 32;

/// The bearer token in this file, made on first use.
pub fn token(file: &Path) -> Result<SecretString, ToolError> {
    if let Some(bytes) = state::read_file(file)? {
        refuse_open_file(file)?;
        let token = String::from_utf8_lossy(&bytes).trim().to_owned();
        if token.len() < SHORTEST_TOKEN {
            return Err(ToolError::new(ErrorKind::Setup, format!("{} holds no usable token", file.display()))
                .hint("remove the file; a new token is made then"));
        }
        return Ok(SecretString::from(token));
    }
    let token = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
    state::write_file(file, token.as_bytes())?;
    Ok(SecretString::from(token))
}

/// Serves until `stop` is cancelled.
pub async fn serve(
    listener: TcpListener,
    token: SecretString,
    services: LazyServices,
    offer: Offer,
    stop: CancellationToken,
) -> Result<(), ToolError> {
    let broken = |error: std::io::Error| ToolError::new(ErrorKind::Setup, format!("the port is broken: {error}"));
    let going_on = TaskTracker::new();
    let (stop_handle, _server) = stop_channel();
    let methods = methods(services, offer, going_on.clone())?;
    let rpc = jsonrpsee::server::Server::builder()
        .set_config(ServerConfig::builder().max_request_body_size(LONGEST_REQUEST).build())
        .to_service_builder()
        .build(methods, stop_handle);
    let guard = Arc::new(Guard { port: listener.local_addr().map_err(broken)?.port(), token });
    let routes = axum::Router::new()
        .fallback_service(axum::error_handling::HandleError::new(rpc, unanswerable))
        .layer(middleware::from_fn_with_state(guard, check));
    let result = tokio::select! {
        result = axum::serve(listener, routes) => result.map_err(broken),
        () = stop.cancelled() => Ok(()),
    };
    going_on.close();
    result
}

fn methods(services: LazyServices, offer: Offer, going_on: TaskTracker) -> Result<RpcModule<()>, ToolError> {
    let twice = |error| ToolError::new(ErrorKind::Internal, format!("a method can't be registered: {error}"));
    let mut module = RpcModule::new(());
    let read_only = offer.is_read_only();
    for tool in TOOLS {
        if let Err(left_out) = offer.find(tool.name) {
            // An unknown method would not tell why.
            module.register_method(tool.name, move |_, _, _| Err::<Value, _>(rpc_error(&left_out))).map_err(twice)?;
            continue;
        }
        let (services, going_on) = (services.clone(), going_on.clone());
        module
            .register_async_method(tool.name, move |params, _, _| {
                let (services, going_on) = (services.clone(), going_on.clone());
                async move {
                    let arguments = named(&params).map_err(|error| rpc_error(&error))?;
                    // A caller that hangs up must not stop a call in its middle.
                    let call = tokio::spawn(async move {
                        let services = services.get().await?;
                        let after_answer = Some(going_on);
                        let context = Context { after_answer, read_only, ..Context::new(services) };
                        tools::call(&context, tool.name, arguments).await
                    });
                    match call.await {
                        Ok(Ok(answer)) => Ok(answer.value),
                        Ok(Err(error)) => Err(rpc_error(&error)),
                        Err(error) => Err(rpc_error(&ToolError::new(ErrorKind::Internal, error.to_string()))),
                    }
                }
            })
            .map_err(twice)?;
    }
    module.register_method("rpc.discover", move |_, _, _| catalog::open_rpc(&offer)).map_err(twice)?;
    Ok(module)
}

fn named(params: &Params<'_>) -> Result<Value, ToolError> {
    match params.parse::<Value>() {
        Ok(Value::Array(_)) => {
            Err(ToolError::invalid("params", "expected an object of named parameters, not an array")
                .hint("`rpc.discover` names the parameters of each method"))
        }
        Ok(arguments) => Ok(arguments),
        Err(error) => Err(ToolError::invalid("params", error.message())),
    }
}

fn rpc_error(error: &ToolError) -> ErrorObjectOwned {
    ErrorObjectOwned::owned(error.kind.json_rpc_code(), error.message.clone(), Some(error))
}

/// Who may ask.
struct Guard {
    port: u16,
    token: SecretString,
}

async fn check(State(guard): State<Arc<Guard>>, request: Request, next: Next) -> Response {
    let headers = request.headers();
    let refusal = if !guard.is_local(headers) {
        Some((StatusCode::FORBIDDEN, "only requests to this machine's own address are answered\n"))
    } else if !guard.has_token(headers) {
        Some((StatusCode::UNAUTHORIZED, "send `Authorization: Bearer` with the token from the file `rpc-token`\n"))
    } else {
        None
    };
    match refusal {
        Some((StatusCode::UNAUTHORIZED, text)) => {
            (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], text).into_response()
        }
        Some(refusal) => refusal.into_response(),
        None => next.run(request).await,
    }
}

impl Guard {
    fn is_local(&self, headers: &HeaderMap) -> bool {
        let ours = |authority: &str| {
            ["127.0.0.1", "localhost", "[::1]"].iter().any(|host| authority == format!("{host}:{}", self.port))
        };
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or_default());
        let origin_is_ours = text(header::ORIGIN).is_none_or(|origin| origin.strip_prefix("http://").is_some_and(ours));
        text(header::HOST).is_some_and(ours) && origin_is_ours
    }

    fn has_token(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let given = given.strip_prefix("Bearer ").unwrap_or_default().as_bytes();
        let wanted = self.token.expose_secret().as_bytes();
        // Looks at every byte, so that the time tells nothing about where they differ.
        given.len() == wanted.len() && given.iter().zip(wanted).fold(0, |all, (a, b)| all | (a ^ b)) == 0
    }
}

async fn unanswerable(error: Box<dyn std::error::Error + Send + Sync>) -> (StatusCode, String) {
    tracing::warn!(%error, "a JSON-RPC request failed below the protocol");
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
}
