//! A call's question as MCP's elicitation, in both eras of the protocol.
//!
//! An older client is sent a request while its call goes on. A newer one may be sent none: its call is answered with
//! the question, and it makes the same call again with the answer. Until then nothing goes on: the first call ends as
//! one that could not ask, which by the rules of asking has begun nothing.
//!
//! The form has one box to tick. A form without any would take one click less, but a client whose user wants to be
//! asked nothing accepts empty forms by itself, and nobody has agreed to anything then.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rmcp::RoleServer;
use rmcp::model::{
    BooleanSchema, CallToolRequestParams, ClientResult, ElicitRequest, ElicitRequestParams, ElicitResult,
    ElicitationAction, ElicitationSchema, InputRequest, InputRequiredResult, PrimitiveSchemaDefinition,
    ProtocolVersion, ServerRequest,
};
use rmcp::service::{Peer, PeerRequestOptions, RequestContext, RequestHandle, ServiceError};
use serde::Deserialize;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::tools::context::{Answered, Ask, Question};
use crate::tools::{ErrorKind, ToolError};

/// The box in the form, and the question's name in an answer that stands for it.
const FIELD: &str = "confirm";
/// How long an answer that comes with a second call is still taken for the question of the first.
const ANSWERED_WITHIN: Duration = Duration::from_secs(600);
/// More questions at a time than any person would be asked.
const MOST_OPEN: usize = 32;

/// The questions that newer clients were answered with and have not come back to. Each is answered once.
#[derive(Clone, Default)]
pub(super) struct OpenQuestions(Arc<Mutex<Vec<OpenQuestion>>>);

struct OpenQuestion {
    id: String,
    tool: String,
    arguments: Value,
    message: String,
    put_at: Instant,
}

impl OpenQuestions {
    /// The question that this call was answered with before.
    fn take(&self, id: &str, tool: &str, arguments: &Value) -> Option<OpenQuestion> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|question| question.put_at.elapsed() < ANSWERED_WITHIN);
        let same =
            |question: &OpenQuestion| question.id == id && question.tool == tool && question.arguments == *arguments;
        open.iter().position(same).map(|index| open.remove(index))
    }

    /// Its id, by which it is found again.
    fn put(&self, tool: &str, arguments: &Value, message: &str) -> String {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if open.len() >= MOST_OPEN {
            open.remove(0);
        }
        let id = uuid::Uuid::new_v4().to_string();
        open.push(OpenQuestion {
            id: id.clone(),
            tool: tool.to_owned(),
            arguments: arguments.clone(),
            message: message.to_owned(),
            put_at: Instant::now(),
        });
        id
    }
}

/// How one call's questions reach its client.
pub(super) enum Asking {
    /// The client said nothing of forms.
    Nobody,
    ByRequest {
        peer: Peer<RoleServer>,
        cancel: CancellationToken,
    },
    ByAnswer(Arc<Rounds>),
}

/// What a newer client's call brings along, and what it is to be answered with.
pub(super) struct Rounds {
    open: OpenQuestions,
    tool: String,
    arguments: Value,
    /// The question that this call answers, and how.
    answered: Mutex<Option<(String, Answered)>>,
    /// The question to answer the call with.
    unanswered: Mutex<Option<String>>,
}

impl Asking {
    pub(super) fn of(
        request: &CallToolRequestParams,
        arguments: &Value,
        context: &RequestContext<RoleServer>,
        open: &OpenQuestions,
    ) -> Self {
        let declared = context.client_capabilities().and_then(|capabilities| capabilities.elicitation);
        // In the older versions an empty capability stands for forms.
        if !declared.is_some_and(|declared| declared.form.is_some() || declared.url.is_none()) {
            return Self::Nobody;
        }
        if context.protocol_version().is_none_or(|version| version < ProtocolVersion::V_2026_07_28) {
            return Self::ByRequest { peer: context.peer.clone(), cancel: context.ct.clone() };
        }
        let question = request.request_state.as_deref().and_then(|id| open.take(id, &request.name, arguments));
        let answer = request.input_responses.as_ref().and_then(|answers| answers.get(FIELD));
        let answered = question.zip(answer).map(|(question, answer)| {
            let result = ElicitResult::deserialize(answer);
            (question.message, result.map_or(Answered::Declined, |result| meant(&result)))
        });
        Self::ByAnswer(Arc::new(Rounds {
            open: open.clone(),
            tool: request.name.to_string(),
            arguments: arguments.clone(),
            answered: Mutex::new(answered),
            unanswered: Mutex::default(),
        }))
    }

    pub(super) fn ask(&self) -> Ask {
        match self {
            Self::Nobody => Ask::cannot(),
            Self::ByRequest { peer, cancel } => {
                let (peer, cancel) = (peer.clone(), cancel.clone());
                Ask::by(move |question| by_request(peer.clone(), cancel.clone(), question))
            }
            Self::ByAnswer(rounds) => {
                let rounds = rounds.clone();
                Ask::by(move |question| std::future::ready(rounds.look_up(question.message)))
            }
        }
    }

    /// What to answer the call with in place of this error, because a question is to be answered first.
    pub(super) fn instead_of(&self, error: &ToolError) -> Option<InputRequiredResult> {
        let Self::ByAnswer(rounds) = self else { return None };
        if error.kind != ErrorKind::Refused {
            return None;
        }
        let message = rounds.unanswered.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let id = rounds.open.put(&rounds.tool, &rounds.arguments, &message);
        let request = InputRequest::Elicitation(ElicitRequest::new(form(message)));
        Some(InputRequiredResult::new(Some(BTreeMap::from([(FIELD.to_owned(), request)])), Some(id)))
    }
}

impl Rounds {
    /// An answer is good for the very words that were asked: a price that has changed is asked about again.
    fn look_up(&self, message: String) -> Answered {
        let answered = self.answered.lock().unwrap_or_else(PoisonError::into_inner).take();
        match answered {
            Some((asked, answered)) if asked == message => answered,
            _ => {
                self.unanswered.lock().unwrap_or_else(PoisonError::into_inner).replace(message);
                Answered::CannotAsk
            }
        }
    }
}

fn form(message: String) -> ElicitRequestParams {
    let tick = PrimitiveSchemaDefinition::Boolean(BooleanSchema::new().title("Yes, do it"));
    let mut schema = ElicitationSchema::new(BTreeMap::from([(FIELD.to_owned(), tick)]));
    schema.required = Some(vec![FIELD.to_owned()]);
    ElicitRequestParams::FormElicitationParams { meta: None, message, requested_schema: schema }
}

fn meant(result: &ElicitResult) -> Answered {
    let ticked = result.content.as_ref().is_some_and(|content| content[FIELD] == true);
    if result.action == ElicitationAction::Accept && ticked { Answered::Yes } else { Answered::Declined }
}

async fn by_request(peer: Peer<RoleServer>, cancel: CancellationToken, question: Question) -> Answered {
    let request = ServerRequest::ElicitRequest(ElicitRequest::new(form(question.message)));
    let handle = match peer.send_cancellable_request(request, PeerRequestOptions::no_options()).await {
        Ok(handle) => handle,
        Err(error) => {
            tracing::warn!(%error, "a question could not be sent");
            return Answered::CannotAsk;
        }
    };
    // Whoever stops waiting drops this future. The task outlives it, to take the question back.
    let withdrawn = cancel.child_token();
    let _waiting = withdrawn.clone().drop_guard();
    tokio::spawn(answer(handle, withdrawn)).await.unwrap_or(Answered::Declined)
}

async fn answer(mut handle: RequestHandle<RoleServer>, withdrawn: CancellationToken) -> Answered {
    let response = tokio::select! {
        response = &mut handle.rx => response,
        () = withdrawn.cancelled() => {
            // Nobody is left to tell when the client has gone.
            let _ = handle.cancel(Some("the question is no longer open".to_owned())).await;
            return Answered::Declined;
        }
    };
    match response {
        Ok(Ok(ClientResult::ElicitResult(result))) => meant(&result),
        // It declared what it can't do after all.
        Ok(Err(ServiceError::McpError(error))) => {
            tracing::warn!(code = error.code.0, "the client answered a question with an error");
            Answered::CannotAsk
        }
        _ => Answered::Declined,
    }
}
