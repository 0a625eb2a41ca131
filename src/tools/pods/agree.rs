//! A person's agreement to a price above the config's threshold: in an argument, or by a question.

use crate::config::Limits;
use crate::tools::context::{Answered, Question};
use crate::tools::waiting::Waiting;
use crate::tools::{Context, ToolError};

/// USD an hour; less is rounding.
const ROUNDING: f64 = 0.0005;

/// Whether a price needs no agreement, or has it in the argument `confirm_price`.
pub(super) fn is_agreed(price: f64, confirm_price: Option<f64>, limits: &Limits) -> bool {
    price <= limits.confirm_above_per_hour.max(confirm_price.unwrap_or(0.0)) + ROUNDING
}

/// The least whole cents that agree to a price: what is told is what can be agreed to.
pub(super) fn whole_cents(price: f64) -> f64 {
    ((price - ROUNDING) * 100.0).ceil() / 100.0
}

/// Asks for the agreement to `price`; `what` says what is to be done, like `create the pod comfy`. The caller holds no
/// lock, has begun nothing, and looks at prices and caps again after it.
pub(super) async fn ask(
    context: &Context,
    waiting: &Waiting<'_>,
    what: &str,
    price: f64,
    limits: &Limits,
) -> Result<(), ToolError> {
    let threshold = limits.confirm_above_per_hour;
    let price = whole_cents(price);
    let asked = what
        .chars()
        .next()
        .map_or_else(String::new, |first| first.to_uppercase().chain(what.chars().skip(1)).collect());
    let message = format!(
        "{asked} for up to ${price:.2} an hour? That is above the ${threshold:.2} an hour that need no agreement."
    );
    waiting.tell("the user's agreement to the price");
    let answered = context.ask.confirm(Question { message, limit: waiting.left() }).await;
    let refused = match answered {
        Answered::Yes => return Ok(()),
        Answered::Declined => "the question was declined or not answered in time",
        Answered::CannotAsk => "nobody can be asked here",
    };
    Err(ToolError::refused(format!(
        "to {what} may cost ${price:.2}/h, which is above the ${threshold:.2}/h that need no agreement \
         (limits.confirm_above_per_hour), and {refused}; nothing was changed"
    ))
    .hint(format!(
        "with the user's agreement, call again with confirm_price: {price:.2}; or ask for something cheaper"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_price_that_is_told_is_agreed_to() {
        let limits = Limits::default();
        for price in [1.0004, 1.1, 1.19, 1.194, 1.1951, 1.2, 2.999] {
            let told: f64 = format!("{:.2}", whole_cents(price)).parse().expect("a number");
            assert!(is_agreed(price, Some(told), &limits), "{price}: {told}");
            assert!(told < price + 0.01, "{price}: {told}");
        }
    }
}
