//! How tools write what they all write.

/// USD with cents; what is less than a cent with four digits, so that it isn't told as nothing.
pub fn usd(amount: f64) -> String {
    if amount != 0.0 && amount.abs() < 0.01 { format!("${amount:.4}") } else { format!("${amount:.2}") }
}

/// A state as its JSON says it, like `dry_run`.
pub(super) fn word(state: impl serde::Serialize) -> String {
    serde_json::to_value(state).ok().and_then(|word| word.as_str().map(str::to_owned)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_money_is_not_nothing() {
        let said = [0.0, 0.0017, 0.01, 1.5, -0.002].map(usd);
        assert_eq!(said, ["$0.00", "$0.0017", "$0.01", "$1.50", "$-0.0020"]);
    }
}
