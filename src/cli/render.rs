//! Answers as people read them: tables and short lines made from the JSON that every face gives.
//!
//! Names in answers come from outside. A terminal obeys control characters, so none gets through.

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::Value;

pub use crate::errors::harmless as clean;

/// One column of a table: its title, and its cell of an item.
pub struct Column {
    title: &'static str,
    cell: fn(&Value) -> String,
}

pub const fn column(title: &'static str, cell: fn(&Value) -> String) -> Column {
    Column { title, cell }
}

/// A table of the items of an array, or `empty` when there are none.
pub fn table(items: &Value, columns: &[Column], empty: &str) -> String {
    let items = items.as_array().map(Vec::as_slice).unwrap_or_default();
    if items.is_empty() {
        return empty.to_owned();
    }
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(columns.iter().map(|column| column.title));
    for item in items {
        table.add_row(columns.iter().map(|column| clean(&(column.cell)(item))));
    }
    table.trim_fmt()
}

/// A value as a word: strings as they are, lists joined, nothing as `-`.
pub fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// USD as every answer writes it.
pub fn usd(value: &Value) -> String {
    value.as_f64().map_or_else(|| "-".to_owned(), crate::tools::usd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_name_from_outside_can_not_steer_the_terminal() {
        let items = json!([{"name": "a\u{1b}[2Jb", "price": 0.5}]);
        let columns = [column("NAME", |item| text(&item["name"])), column("PRICE", |item| usd(&item["price"]))];
        let table = table(&items, &columns, "none");
        assert!(table.contains("a\u{fffd}[2Jb") && table.contains("$0.50"), "{table:?}");
        assert!(!table.contains('\u{1b}'), "{table:?}");
    }
}
