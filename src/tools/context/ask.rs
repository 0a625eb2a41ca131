//! A question to the person behind a call. A face that can't put one says so, and then the caller needs their word in
//! an argument.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::errors::harmless;

/// The longest a question may stay open. Clients give up a call after 60 s.
const LONGEST: Duration = Duration::from_secs(40);

/// What a person is to agree to.
#[derive(Debug, Clone)]
pub struct Question {
    /// One or two sentences that say what happens and what it costs, for a person who sees nothing else of the call.
    /// They go through the assistant's program: never a secret. The same question has the same words when the call is
    /// made again, for some clients bring the answer with a second call: so no cost that grows while they think.
    pub message: String,
    /// What is left of the call's time.
    pub limit: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    Yes,
    /// A no, no answer in time, or a call that was given up meanwhile. There are clients that say no without having
    /// shown the question to anyone, so a refusal names the way without a question in this case, too.
    Declined,
    /// Nobody was asked.
    CannotAsk,
}

impl Answered {
    /// The refusal's words, to go behind what was refused; `None` for a yes.
    pub fn refusal(self) -> Option<&'static str> {
        match self {
            Self::Yes => None,
            Self::Declined => Some("the question whether to do it was declined or not answered in time"),
            Self::CannotAsk => Some("it needs a person's agreement, and nobody can be asked here"),
        }
    }
}

type Asker = dyn Fn(Question) -> BoxFuture<'static, Answered> + Send + Sync;

/// The way a face asks, if it has one.
#[derive(Clone)]
pub struct Ask(Option<Arc<Asker>>);

impl Ask {
    /// For faces that have nobody to ask.
    pub fn cannot() -> Self {
        Self(None)
    }

    /// `asker` puts the question and takes it back when its future is dropped.
    pub fn by<F>(asker: impl Fn(Question) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Answered> + Send + 'static,
    {
        Self(Some(Arc::new(move |question| Box::pin(asker(question)))))
    }

    /// Asks and waits, at most 40 s and never beyond the question's limit. People take their time: the caller must
    /// hold no lock meanwhile, must have begun nothing yet, and must look at the world again after a yes.
    pub async fn confirm(&self, question: Question) -> Answered {
        let Some(asker) = &self.0 else { return Answered::CannotAsk };
        let limit = question.limit.min(LONGEST);
        if limit.is_zero() {
            return Answered::CannotAsk;
        }
        let question = Question { message: harmless(&question.message), limit };
        tokio::time::timeout(limit, asker(question)).await.unwrap_or(Answered::Declined)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    fn question(limit: Duration) -> Question {
        Question { message: "End \u{1b}[2Jit?".to_owned(), limit }
    }

    #[tokio::test]
    async fn a_question_is_harmless_and_stays_open_as_long_as_the_call_and_40_s_allow() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let record = seen.clone();
        let ask = Ask::by(move |question: Question| {
            let is_short = question.limit < LONGEST;
            record.lock().expect("no panic").push(question);
            async move { if is_short { std::future::pending().await } else { Answered::Yes } }
        });
        let short = Duration::from_millis(20);
        assert_eq!(ask.confirm(question(short)).await, Answered::Declined, "nobody answers");
        assert_eq!(ask.confirm(question(Duration::from_secs(45))).await, Answered::Yes);
        assert_eq!(ask.confirm(question(Duration::ZERO)).await, Answered::CannotAsk, "there is no time for it");
        let seen = seen.lock().expect("no panic");
        assert_eq!(seen.iter().map(|question| question.limit).collect::<Vec<_>>(), [short, LONGEST]);
        assert!(seen.iter().all(|question| !question.message.contains('\u{1b}')), "{seen:?}");
    }

    #[tokio::test]
    async fn without_a_way_nobody_is_asked() {
        assert_eq!(Ask::cannot().confirm(question(LONGEST)).await, Answered::CannotAsk);
    }
}
