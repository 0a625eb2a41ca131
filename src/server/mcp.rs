//! MCP over stdio: the only file that names rmcp. Both eras of the protocol are served as rmcp gives them: `initialize`
//! of the older clients, and the newer ones' requests that carry version and capabilities themselves.
//!
//! Nothing but JSON-RPC goes to the output: one writer puts out whole lines, for rmcp and for the refusals of
//! [`super::lines`] alike.

mod ask;
mod progress;
mod transport;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, CustomRequest, CustomResult, ErrorCode,
    Implementation, ListToolsResult, MetaObject, PaginatedRequestParams, ServerCapabilities, ServerConfig, Tool,
};
use rmcp::service::{RequestContext, ServerInitializeError};
use rmcp::{ErrorData, RoleServer, ServerHandler, ServiceExt};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{LazyServices, catalog};
use crate::tools::context::{Ask, Progress};
use crate::tools::{self, Context, Offer, ToolError};
use ask::{Asking, OpenQuestions};
use progress::ProgressPump;
use transport::Transport;

/// How long answers that are nearly ready may still be written after the client has closed its end. Clients kill a
/// server that takes much longer to go.
const GRACE: Duration = Duration::from_millis(700);
/// Where an error's machine-readable half lies in a result's `_meta`.
const ERROR_META: &str = "autopod-mcp/error";

const INSTRUCTIONS: &str = "\
Drives GPU pods at RunPod that run ComfyUI. From nothing to a picture: create_pod_with_volume (finds a GPU, makes the \
pod `comfy`), start_tunnel (ComfyUI at a port of 127.0.0.1), comfy_run (a workflow; the pictures are saved as files), \
terminate_pod. No call lasts over 45 s: an answer with `done: false` is no failure; the work goes on, and `next` is \
the exact call to make. Calling again with the same name never makes a second pod. \
A pod costs money from its creation until terminate_pod answers `gone`; it ends by itself at its deadline (4 h unless \
asked otherwise), and caps limit what may be spent. Terminate when the work is done. Errors about a pod tell whether \
it is still being billed, and what to do next. list_pods shows what runs and costs now; list_gpus shows prices and stock.";

const SANDBOX_INSTRUCTIONS: &str = "
This server was started with --sandbox: no real GPU and no real money; prices and costs are play. Its ComfyUI has no \
models and these nodes: EmptyImage, LoadImage, ImageInvert, ImageScale, SaveImage, PreviewImage, and SandboxSampler, \
which paints. A workflow that runs there: {\"1\": {\"class_type\": \"SandboxSampler\", \"inputs\": {\"width\": 512, \
\"height\": 512, \"steps\": 20, \"seed\": 1, \"step_ms\": 40}}, \"2\": {\"class_type\": \"SaveImage\", \"inputs\": \
{\"images\": [\"1\", 0], \"filename_prefix\": \"picture\"}}}";

/// What the server stands in front of; an assistant has to know whether it spends money.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Surroundings {
    RunPod,
    Sandbox,
}

/// Serves until the input ends or `stop` is cancelled, and returns within a second of either.
pub async fn serve(
    input: impl AsyncRead + Send + Unpin + 'static,
    output: impl AsyncWrite + Send + Unpin + 'static,
    services: LazyServices,
    surroundings: Surroundings,
    offer: Offer,
    stop: CancellationToken,
) {
    let going_on = TaskTracker::new();
    let face = Arc::new(Face {
        services,
        surroundings,
        offer,
        going_on: going_on.clone(),
        questions: OpenQuestions::default(),
        tools: OnceLock::new(),
    });
    let input_ended = CancellationToken::new();
    let transport = Transport::start(input, output, input_ended.clone());
    tokio::select! {
        () = sessions(face, transport) => {}
        () = async { input_ended.cancelled().await; tokio::time::sleep(GRACE).await } => {}
        () = stop.cancelled() => {}
    }
    going_on.close();
}

/// rmcp gives up a session whose first message it didn't expect, such as a notification before `initialize`. That is
/// the client's slip and no reason to end: the next message opens a new session over the same pipes.
async fn sessions<W: AsyncWrite + Send + Unpin + 'static>(face: Arc<Face>, transport: Transport<W>) {
    loop {
        match face.clone().serve(transport.clone()).await {
            Ok(session) => {
                if let Err(error) = session.waiting().await {
                    tracing::error!(%error, "the session ended by a defect");
                }
                return;
            }
            Err(ServerInitializeError::ConnectionClosed(_)) => return,
            Err(ServerInitializeError::TransportError { error, .. }) => {
                tracing::warn!(%error, "the output is closed");
                return;
            }
            // Its `Display` would put the whole message into the log, with whatever is secret in it.
            Err(ServerInitializeError::ExpectedInitializeRequest(_)) => {
                tracing::warn!("a message before the session was open was ignored");
            }
            Err(error) => tracing::warn!(%error, "a session could not be opened"),
        }
    }
}

struct Face {
    services: LazyServices,
    surroundings: Surroundings,
    offer: Offer,
    /// Work that goes on after its answer.
    going_on: TaskTracker,
    questions: OpenQuestions,
    /// Made when the first client asks for them, after it was greeted.
    tools: OnceLock<Vec<Tool>>,
}

fn published_tools(offer: &Offer) -> Vec<Tool> {
    let read = |tool| serde_json::from_value::<Tool>(catalog::entry(tool));
    offer
        .tools()
        .filter_map(|tool| {
            read(tool).inspect_err(|error| tracing::error!(tool = tool.name, %error, "can't be published")).ok()
        })
        .collect()
}

impl ServerHandler for Face {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(
                Implementation::new(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")).with_title("autopod"),
            )
            .with_instructions(self.instructions())
    }

    async fn list_tools(
        &self,
        _page: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::with_all_items(self.tools().to_vec()))
    }

    fn get_tool(&self, name: &str) -> Option<Tool> {
        self.tools().iter().find(|tool| tool.name == name).cloned()
    }

    async fn on_custom_request(
        &self,
        request: CustomRequest,
        _context: RequestContext<RoleServer>,
    ) -> Result<CustomResult, ErrorData> {
        let message = format!("there is no method `{}`; this server offers tools/list and tools/call", request.method);
        Err(ErrorData::new(ErrorCode::METHOD_NOT_FOUND, message, None))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        if let Err(error) = self.offer.find(&request.name) {
            return Err(ErrorData::new(ErrorCode::INVALID_PARAMS, error.to_string(), None));
        }
        let arguments = request.arguments.clone().map(Value::Object).unwrap_or_default();
        let asking = Asking::of(&request, &arguments, &context, &self.questions);
        let pump = ProgressPump::start(&context);
        let result = self.call(&request.name, arguments, asking.ask(), pump.progress(), context.ct.clone()).await;
        pump.finish().await;
        if let Some(question) = result.as_ref().err().and_then(|error| asking.instead_of(error)) {
            return Ok(question.into());
        }
        Ok(match result {
            Ok(answer) => {
                let mut result = CallToolResult::success(vec![ContentBlock::text(answer.text)]);
                result.structured_content = Some(answer.value);
                result
            }
            Err(error) => error_result(&error),
        }
        .into())
    }
}

impl Face {
    fn instructions(&self) -> String {
        let mut text = INSTRUCTIONS.to_owned();
        if !self.offer.is_everything() {
            let names: Vec<_> = self.offer.tools().map(|tool| tool.name).collect();
            text.push_str(&format!(
                "\nThis server was started with a choice of its tools. Of those named above it offers no others than: {}.",
                names.join(", ")
            ));
        }
        if self.surroundings == Surroundings::Sandbox {
            text.push_str(SANDBOX_INSTRUCTIONS);
        }
        text
    }

    fn tools(&self) -> &[Tool] {
        self.tools.get_or_init(|| published_tools(&self.offer))
    }

    async fn call(
        &self,
        name: &str,
        arguments: Value,
        ask: Ask,
        progress: Progress,
        cancel: CancellationToken,
    ) -> Result<tools::Answer, ToolError> {
        let services = self.services.get().await?;
        let after_answer = Some(self.going_on.clone());
        let read_only = self.offer.is_read_only();
        let context = Context { progress, ask, cancel, read_only, after_answer, ..Context::new(services) };
        tools::call(&context, name, arguments).await
    }
}

/// Text only: some clients check structured content against the output schema even of errors, and hide the message.
fn error_result(error: &ToolError) -> CallToolResult {
    let mut result = CallToolResult::error(vec![ContentBlock::text(error.to_string())]);
    let mut meta = MetaObject::default();
    meta.0.insert(ERROR_META.to_owned(), json!(error));
    result.meta = Some(meta);
    result
}
