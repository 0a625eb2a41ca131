//! The arrows between the modules, as the crate's documentation draws them: no circles, none back up.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Whom a module may import. Leaves may be imported by anyone, and nothing is imported from `main` and `cli`.
const ARROWS: &[(&str, &[&str])] = &[
    ("main", &["cli"]),
    ("cli", &["server", "tools", "keeper", "app", "sandbox", "ssh"]),
    ("server", &["tools"]),
    ("app", &["tools", "keeper", "fleet", "tunnel", "comfy", "ssh", "runpod", "provider"]),
    ("tools", &["fleet", "tunnel", "comfy", "ssh", "provider"]),
    ("keeper", &["fleet", "tunnel", "comfy", "ssh", "provider"]),
    ("runpod", &["provider"]),
    ("fleet", &["provider"]),
    ("tunnel", &["ssh"]),
    ("comfy", &[]),
    ("ssh", &[]),
    ("provider", &[]),
    // A RunPod of its own, so that it can't agree with the client by sharing its mistakes.
    ("sandbox", &[]),
];

const LEAVES: &[&str] = &["state", "background", "config", "environment", "errors", "steps", "timing"];

#[test]
fn modules_import_only_what_lies_below_them() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for file in rust_files(&source) {
        let module = module_of(&source, &file);
        if module == "lib" {
            continue;
        }
        let text = std::fs::read_to_string(&file).expect("a source file can be read");
        for (number, line) in text.lines().enumerate() {
            for imported in imports(line) {
                seen.insert(module.clone());
                if !may_import(&module, &imported) {
                    wrong.push(format!("{}:{}: {module} imports {imported}", file.display(), number + 1));
                }
            }
        }
    }
    assert!(seen.contains("cli") && seen.contains("tools"), "the imports were not found: {seen:?}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn may_import(module: &str, imported: &str) -> bool {
    if module == imported {
        return true;
    }
    let leaf = LEAVES.contains(&imported);
    match ARROWS.iter().find(|(name, _)| *name == module) {
        Some(("sandbox", _)) => false,
        Some((_, below)) => leaf || below.contains(&imported),
        None => LEAVES.contains(&module) && leaf,
    }
}

#[test]
fn arrows_lead_down() {
    for (position, (module, below)) in ARROWS.iter().enumerate() {
        for name in *below {
            let of_name = ARROWS.iter().position(|(other, _)| other == name);
            assert!(of_name.is_some_and(|of_name| of_name > position), "{module} -> {name} leads back up");
        }
    }
    assert!(!may_import("server", "app") && !may_import("tools", "cli") && !may_import("sandbox", "state"));
    assert!(may_import("tools", "fleet") && may_import("runpod", "timing"));
    assert_eq!(imports("    use crate::{state, tools::{self, Context}};"), ["state", "tools"]);
    assert_eq!(imports("let x = crate::app::services();"), ["app"]);
    assert_eq!(imports("pub(in crate::tools) fn x(y: crate::ssh::Y)"), ["tools", "ssh"]);
    assert!(imports("//! See [`crate::tools`].").is_empty());
}

/// The top modules that a line names after `crate::`, comments left out.
fn imports(line: &str) -> Vec<String> {
    let code = line.split("//").next().unwrap_or_default();
    let mut modules = Vec::new();
    for after in code.split("crate::").skip(1) {
        match after.strip_prefix('{') {
            None => modules.push(word(after)),
            Some(list) => {
                let mut depth = 0;
                let mut start = true;
                for (index, c) in list.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 0 => start = true,
                        c if start && !c.is_whitespace() => {
                            modules.push(word(&list[index..]));
                            start = false;
                        }
                        _ => {}
                    }
                    if depth < 0 {
                        break;
                    }
                }
            }
        }
    }
    modules
}

fn word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

fn module_of(source: &Path, file: &Path) -> String {
    let relative = file.strip_prefix(source).expect("the file lies in src");
    let first = relative.iter().next().map(Path::new).expect("a path has a first part");
    first.with_extension("").to_string_lossy().into_owned()
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).expect("src can be read") {
        let path = entry.expect("its entries can be read").path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}
