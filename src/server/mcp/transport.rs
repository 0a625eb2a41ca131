//! stdin and stdout as rmcp's transport, with our own line filter and one writer of whole lines.

use std::io;
use std::sync::Arc;

use rmcp::model::{
    CallToolRequestParams, ClientJsonRpcMessage, ClientRequest, InitializeRequestParams, JsonRpcMessage,
};
use rmcp::service::{RoleServer, RxJsonRpcMessage, TxJsonRpcMessage};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

use crate::server::lines::{Line, LineReader};
use crate::tools::ToolError;

/// Messages read ahead of rmcp; a client that sends faster waits at its pipe.
const READ_AHEAD: usize = 64;

/// A clone reads and writes the same pipes, so that a new session can take over from one that failed to open.
pub(super) struct Transport<W> {
    incoming: Arc<Mutex<mpsc::Receiver<ClientJsonRpcMessage>>>,
    output: Output<W>,
}

impl<W> Clone for Transport<W> {
    fn clone(&self) -> Self {
        Self { incoming: self.incoming.clone(), output: self.output.clone() }
    }
}

impl<W: AsyncWrite + Send + Unpin + 'static> Transport<W> {
    /// `input_ended` is cancelled when nothing more will come.
    pub(super) fn start(
        input: impl AsyncRead + Send + Unpin + 'static,
        output: W,
        input_ended: CancellationToken,
    ) -> Self {
        let (sender, incoming) = mpsc::channel(READ_AHEAD);
        let output = Output(Arc::new(Mutex::new(output)));
        let refusals = output.clone();
        tokio::spawn(async move {
            let _ended = input_ended.drop_guard();
            if let Err(error) = read(LineReader::new(input), &sender, &refusals).await {
                tracing::warn!(%error, "stdin or stdout is broken");
            }
        });
        Self { incoming: Arc::new(Mutex::new(incoming)), output }
    }
}

/// Hands messages to rmcp and answers itself what rmcp would answer badly or not at all.
async fn read<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    mut lines: LineReader<R>,
    messages: &mpsc::Sender<ClientJsonRpcMessage>,
    refusals: &Output<W>,
) -> io::Result<()> {
    while let Some(line) = lines.next().await? {
        let (id, code, reason) = match line {
            Line::Refused { id, reason } => (id, -32600, reason),
            Line::Message(value) => match decode(&value) {
                Ok(message) => {
                    if messages.send(message).await.is_err() {
                        return Ok(());
                    }
                    continue;
                }
                Err(reason) => (value.get("id").cloned().unwrap_or_default(), -32602, reason),
            },
        };
        // The reason may quote the message, and so a secret: it goes to the client alone.
        tracing::warn!(%id, code, "a message was refused");
        refusals.write(&json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": reason}})).await?;
    }
    Ok(())
}

/// rmcp takes a known method with parameters that don't fit for an unknown method. The two that carry what a caller
/// wrote by hand are told what is wrong with them instead.
fn decode(value: &Value) -> Result<ClientJsonRpcMessage, String> {
    let message = ClientJsonRpcMessage::deserialize(value).map_err(|error| error.to_string())?;
    if let JsonRpcMessage::Request(request) = &message
        && let ClientRequest::CustomRequest(custom) = &request.request
    {
        let params = custom.params.clone().unwrap_or_else(|| json!({}));
        let fault = match custom.method.as_str() {
            "initialize" => fault::<InitializeRequestParams>(&params).map(|fault| format!("initialize: {fault}")),
            "tools/call" => fault::<CallToolRequestParams>(&params).map(|fault| {
                let tool = params.get("name").and_then(Value::as_str).unwrap_or("tools/call");
                format!("{tool}: {fault}")
            }),
            _ => None,
        };
        if let Some(fault) = fault {
            return Err(fault);
        }
    }
    Ok(message)
}

/// The first field that doesn't fit, and what was expected there.
fn fault<T: DeserializeOwned>(params: &Value) -> Option<String> {
    let error = serde_path_to_error::deserialize::<_, T>(params).err()?;
    let field = error.path().to_string();
    Some(ToolError::invalid(if field == "." { "params" } else { &field }, error.inner()).message)
}

impl<W: AsyncWrite + Send + Unpin + 'static> rmcp::transport::Transport<RoleServer> for Transport<W> {
    type Error = io::Error;

    fn send(
        &mut self,
        item: TxJsonRpcMessage<RoleServer>,
    ) -> impl Future<Output = Result<(), Self::Error>> + Send + 'static {
        let output = self.output.clone();
        async move { output.write(&item).await }
    }

    /// Dropped and called again at will by rmcp; a channel loses nothing by that.
    async fn receive(&mut self) -> Option<RxJsonRpcMessage<RoleServer>> {
        self.incoming.lock().await.recv().await
    }

    async fn close(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

struct Output<W>(Arc<Mutex<W>>);

impl<W> Clone for Output<W> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<W: AsyncWrite + Unpin> Output<W> {
    /// One message as one line. Whoever writes holds the output until the line is complete.
    async fn write(&self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut output = self.0.lock().await;
        output.write_all(&line).await?;
        output.flush().await
    }
}
