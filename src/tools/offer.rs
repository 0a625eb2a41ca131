//! Which tools a server offers. It is chosen at launch and never changes after: clients may keep the list for good.

use super::{Effect, ErrorKind, TOOLS, ToolDef, ToolError, find};

/// A family of tools, to offer or leave out together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toolset {
    Pods,
    Volumes,
    Tunnels,
    Comfy,
    Spending,
}

impl Toolset {
    pub const ALL: [Self; 5] = [Self::Pods, Self::Volumes, Self::Tunnels, Self::Comfy, Self::Spending];

    pub fn name(self) -> &'static str {
        match self {
            Self::Pods => "pods",
            Self::Volumes => "volumes",
            Self::Tunnels => "tunnels",
            Self::Comfy => "comfy",
            Self::Spending => "spending",
        }
    }
}

/// The launch flags that choose.
pub const TOOLS_FLAG: &str = "tools";
pub const EXCLUDE_FLAG: &str = "exclude-tools";
pub const READ_ONLY_FLAG: &str = "read-only";

/// What was chosen at launch.
#[derive(Debug, Clone, Default)]
pub struct Offer {
    /// Everything when there are none.
    only: Vec<&'static ToolDef>,
    without: Vec<&'static ToolDef>,
    read_only: bool,
}

impl Offer {
    pub fn everything() -> Self {
        Self::default()
    }

    /// By names of toolsets and of tools. No name in `only` stands for everything.
    pub fn choose(only: &[String], without: &[String], read_only: bool) -> Result<Self, ToolError> {
        let offer = Self { only: named(TOOLS_FLAG, only)?, without: named(EXCLUDE_FLAG, without)?, read_only };
        // A server without any tool looks broken to its client.
        if offer.tools().next().is_none() {
            return Err(ToolError::new(ErrorKind::InvalidInput, "these flags leave no tool to offer").hint(there_is()));
        }
        Ok(offer)
    }

    pub fn tools(&self) -> impl Iterator<Item = &'static ToolDef> {
        TOOLS.iter().filter(|tool| self.left_out_by(tool).is_none())
    }

    pub fn is_everything(&self) -> bool {
        self.tools().count() == TOOLS.len()
    }

    /// Whether nothing but tools that read are offered.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The tool of that name, or an error that tells whether it is unknown or by which flag it is left out.
    pub fn find(&self, name: &str) -> Result<&'static ToolDef, ToolError> {
        let offered: Vec<_> = self.tools().map(|tool| tool.name).collect();
        let offered = format!("use one of: {}", offered.join(", "));
        let Some(tool) = find(name) else {
            return Err(ToolError::new(ErrorKind::InvalidInput, format!("there is no tool `{name}`")).hint(offered));
        };
        match self.left_out_by(tool) {
            None => Ok(tool),
            Some(flag) => Err(ToolError::refused(format!(
                "`{name}` is not offered: this server was started with --{flag}; nothing was done"
            ))
            .hint(format!("{offered}; only whoever starts the server can change --{flag}"))),
        }
    }

    fn left_out_by(&self, tool: &ToolDef) -> Option<&'static str> {
        let among = |tools: &[&ToolDef]| tools.iter().any(|other| other.name == tool.name);
        if self.read_only && tool.effect != Effect::Reads {
            Some(READ_ONLY_FLAG)
        } else if among(&self.without) {
            Some(EXCLUDE_FLAG)
        } else if !self.only.is_empty() && !among(&self.only) {
            Some(TOOLS_FLAG)
        } else {
            None
        }
    }
}

/// The tools behind these names.
fn named(flag: &str, names: &[String]) -> Result<Vec<&'static ToolDef>, ToolError> {
    let mut tools = Vec::new();
    for name in names.iter().map(|name| name.trim()) {
        let toolset = Toolset::ALL.into_iter().find(|toolset| toolset.name() == name);
        let before = tools.len();
        tools.extend(TOOLS.iter().filter(|tool| tool.name == name || Some(tool.toolset) == toolset));
        if tools.len() == before {
            let fault = format!("--{flag}: there is no toolset and no tool `{name}`");
            return Err(ToolError::new(ErrorKind::InvalidInput, fault).hint(there_is()));
        }
    }
    Ok(tools)
}

/// Every name that the flags take.
fn there_is() -> String {
    let of = |toolset: Toolset| {
        let tools: Vec<_> = TOOLS.iter().filter(|tool| tool.toolset == toolset).map(|tool| tool.name).collect();
        (!tools.is_empty()).then(|| format!("{} ({})", toolset.name(), tools.join(", ")))
    };
    let toolsets: Vec<_> = Toolset::ALL.into_iter().filter_map(of).collect();
    format!("the toolsets and their tools are: {}", toolsets.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(only: &[&str], without: &[&str], read_only: bool) -> Result<Offer, ToolError> {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        Offer::choose(&owned(only), &owned(without), read_only)
    }

    fn names(offer: &Offer) -> Vec<&'static str> {
        offer.tools().map(|tool| tool.name).collect()
    }

    #[test]
    fn toolsets_and_tools_are_chosen_and_left_out() {
        let offer = choose(&["tunnels", " list_gpus"], &["stop_tunnel"], false).expect("they exist");
        assert_eq!(names(&offer), ["start_tunnel", "list_gpus", "list_tunnels"]);
        let offer = choose(&[], &["pods"], true).expect("some are left");
        assert!(offer.tools().all(|tool| tool.effect == Effect::Reads && tool.toolset != Toolset::Pods));
        assert!(names(&offer).contains(&"list_volumes"));
        assert!(Offer::everything().is_everything() && !offer.is_everything());
    }

    #[test]
    fn a_tool_left_out_is_told_with_the_flag_that_did_it() {
        let offer = choose(&["pods", "volumes"], &["get_pod"], true).expect("some are left");
        for (name, flag) in [("terminate_pod", READ_ONLY_FLAG), ("get_pod", EXCLUDE_FLAG), ("comfy_queue", TOOLS_FLAG)]
        {
            let error = offer.find(name).expect_err("it is left out");
            assert_eq!(error.kind, ErrorKind::Refused, "{error}");
            assert!(error.message.contains(&format!("--{flag};")), "{error}");
        }
        let unknown = offer.find("no_such_tool").expect_err("there is none");
        assert_eq!(unknown.kind, ErrorKind::InvalidInput, "{unknown}");
        assert!(unknown.to_string().contains("list_pods") && !unknown.to_string().contains("terminate_pod"));
    }

    #[test]
    fn names_that_do_not_exist_and_choices_of_nothing_are_refused() {
        for (only, without, read_only, word) in [
            (&["pod"][..], &[][..], false, "`pod`"),
            (&[""], &[], false, "``"),
            (&[], &["everything"], false, "--exclude-tools"),
            (&["start_tunnel"], &[], true, "no tool to offer"),
        ] {
            let error = choose(only, without, read_only).expect_err("it can't be");
            assert_eq!(error.kind, ErrorKind::InvalidInput, "{error}");
            let told = error.to_string();
            assert!(
                [word, "tunnels (start_tunnel, list_tunnels, stop_tunnel)"].iter().all(|w| told.contains(w)),
                "{told}"
            );
        }
    }
}
