//! The flags of `serve` and `rpc` that choose what is offered.

use clap::Args;

use crate::tools::ToolError;
use crate::tools::offer::{EXCLUDE_FLAG, Offer, READ_ONLY_FLAG, TOOLS_FLAG};

#[derive(Debug, Args)]
pub(super) struct OfferArgs {
    /// Offer these alone: toolsets (pods, volumes, tunnels, comfy, spending) or tools, separated by commas.
    #[arg(long = TOOLS_FLAG, value_name = "NAMES", value_delimiter = ',')]
    tools: Vec<String>,
    /// Leave these out: toolsets or tools, separated by commas.
    #[arg(long = EXCLUDE_FLAG, value_name = "NAMES", value_delimiter = ',')]
    exclude_tools: Vec<String>,
    /// Offer only tools that read. They open no tunnel either; pods that are there keep their deadlines.
    #[arg(long = READ_ONLY_FLAG)]
    read_only: bool,
}

impl OfferArgs {
    pub(super) fn chosen(&self) -> Result<Offer, ToolError> {
        Offer::choose(&self.tools, &self.exclude_tools, self.read_only)
    }
}
