//! What the README says of the program is taken from the program.

use std::path::Path;

use autopod_mcp::tools::{Effect, TOOLS};

#[test]
fn the_table_of_tools_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once("<!-- tools -->\n").expect("the marker where the table begins");
    let (_, after) = rest.split_once("<!-- /tools -->").expect("the marker where the table ends");
    let fresh = format!("{before}<!-- tools -->\n{}<!-- /tools -->{after}", table());
    if fresh != text {
        std::fs::write(&path, fresh).unwrap();
        panic!("the table of tools in README.md was stale; it has been rewritten, look at it and commit it");
    }
}

fn table() -> String {
    let mut lines = vec!["| Tool | Effect | What it does |".to_owned(), "|---|---|---|".to_owned()];
    for tool in TOOLS {
        let effect = match tool.effect {
            Effect::Reads => "reads",
            Effect::Creates => "creates",
            Effect::Changes => "changes",
            Effect::Destroys => "destroys",
        };
        lines.push(format!("| `{}` | {effect} | {} |", tool.name, tool.description.replace('|', "\\|")));
    }
    lines.push(String::new());
    lines.join("\n")
}
