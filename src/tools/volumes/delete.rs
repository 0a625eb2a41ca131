//! Deleting a volume: a person's act, so it is no tool. By id only, only while no pod has it, proven by the list.

use std::time::Duration;

use serde_json::json;

use super::{describe, listed, mounting};
use crate::fleet::{Actor, monthly_usd};
use crate::provider::{ProviderError, Volume};
use crate::tools::context::Services;
use crate::tools::{ErrorKind, StillBilling, ToolError, pods};

/// How long the list may go on showing a volume that was deleted.
const PROVEN_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A volume that may be deleted, as a person is shown it.
#[derive(Debug, Clone)]
pub struct Doomed {
    pub id: String,
    pub name: String,
    pub size_gb: u32,
    pub data_center: String,
    pub monthly_usd: f64,
}

/// The volume of that id, if nothing stands in the way of its end.
pub async fn doomed(services: &Services, id: &str) -> Result<Doomed, ToolError> {
    services.refuse_foreign_account().await?;
    let volumes = listed(services).await?.volumes;
    let Some(volume) = volumes.iter().find(|volume| volume.id == id) else {
        return Err(not_by_id(&volumes, id));
    };
    refuse_mounted(services, id).await?;
    Ok(Doomed {
        id: volume.id.clone(),
        name: volume.name.clone(),
        size_gb: volume.size_gb,
        data_center: volume.data_center.clone(),
        monthly_usd: monthly_usd(volume.size_gb, volume.tier.as_deref()),
    })
}

/// Deletes it and proves it gone. The caller has a person's confirmation.
pub async fn delete(services: &Services, doomed: &Doomed) -> Result<(), ToolError> {
    let provider = services.provider()?;
    // The person took a while to answer.
    refuse_mounted(services, &doomed.id).await?;
    match provider.delete_volume(&doomed.id).await {
        // What is gone already is proven by the list, too; so is what came of an unclear answer.
        Ok(_) | Err(ProviderError::NotFound { .. }) => {}
        Err(error) if error.may_have_happened() => tracing::warn!(%error, "the end of a volume had no clear answer"),
        Err(error) => return Err(ToolError::from(error).billing(StillBilling::Yes)),
    }
    let proof = tokio::time::timeout(PROVEN_WITHIN, async {
        loop {
            match listed(services).await {
                Ok(list) if list.volumes.iter().all(|volume| volume.id != doomed.id) => return,
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
    });
    let facts = json!({
        "volume": doomed.name, "volume_id": doomed.id, "size_gb": doomed.size_gb, "data_center": doomed.data_center,
        "usd_per_month": doomed.monthly_usd,
    });
    if proof.await.is_err() {
        services.audit.note(Actor::Command("volume delete"), "volume_delete_unproven", facts);
        return Err(ToolError::new(
            ErrorKind::UnknownOutcome,
            format!("the volume {} was to be deleted, and the list doesn't prove it gone", doomed.id),
        )
        .hint("see `autopod-mcp volume list`, then run the same command again")
        .billing(StillBilling::Possible));
    }
    services.audit.note(Actor::Command("volume delete"), "volume_deleted", facts);
    services.volumes.forget(&doomed.id).await?;
    Ok(())
}

/// Names aren't unique, and what is deleted is lost, so a name is answered with the id.
fn not_by_id(volumes: &[Volume], wanted: &str) -> ToolError {
    let named: Vec<_> = volumes.iter().filter(|volume| volume.name == wanted).map(describe).collect();
    if named.is_empty() {
        return ToolError::not_found(format!("there is no volume with the id `{wanted}`; nothing was deleted"))
            .hint("`autopod-mcp volume list` shows the ids");
    }
    ToolError::invalid("id", format!("`{wanted}` is a name, and a volume is deleted by its id; nothing was deleted"))
        .hint(format!("use an id: {}", named.join(", ")))
}

async fn refuse_mounted(services: &Services, id: &str) -> Result<(), ToolError> {
    let pods = mounting(id, &pods::all(services).await?.pods);
    if pods.is_empty() {
        return Ok(());
    }
    Err(ToolError::refused(format!("the volume {id} is mounted by {}; nothing was deleted", pods.join(", ")))
        .hint("terminate these pods first (`autopod-mcp pod kill`)")
        .billing(StillBilling::Yes))
}
