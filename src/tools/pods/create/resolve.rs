//! From what was asked to an exact request, and what to try for it.

use std::collections::BTreeMap;

use super::CreateInput;
use crate::config::Limits;
use crate::fleet::{Candidate, ENV_EXPIRES_AT, ENV_OWNER, EnvValue, PodRequest};
use crate::provider::{Cloud, VolumeMount};
use crate::tools::ToolError;
use crate::tools::context::Services;
use crate::tools::pods::placement::{self, Wishes};
use crate::tools::volumes::find_volume;
use crate::tunnel::COMFY_PORT;

const DEFAULT_IMAGE: &str = "runpod/comfyui:latest";
const DEFAULT_DISK_GB: u32 = 40;
const DEFAULT_MOUNT: &str = "/workspace";
const SYSTEM_FOLDERS: [&str; 10] = ["bin", "boot", "dev", "etc", "lib", "lib64", "proc", "sbin", "sys", "usr"];
/// What the program itself puts into a pod's environment.
const OURS: [&str; 3] = ["PUBLIC_KEY", ENV_OWNER, ENV_EXPIRES_AT];

#[derive(Debug, Clone)]
pub(super) struct Resolved {
    pub request: PodRequest,
    /// Never empty.
    pub candidates: Vec<Candidate>,
}

impl Resolved {
    /// USD an hour of the dearest candidate.
    pub fn dearest(&self) -> f64 {
        self.candidates.iter().map(|candidate| candidate.price_per_hour).fold(0.0, f64::max)
    }
}

pub(super) async fn resolve(services: &Services, input: &CreateInput, limits: &Limits) -> Result<Resolved, ToolError> {
    let provider = services.provider()?;
    let path = mount_path(services, input)?;
    let config = services.config()?;
    let wanted_volume = input.volume.clone().or_else(|| config.default_volume_id.clone());
    let volume = match &wanted_volume {
        Some(wanted) => Some(find_volume(&provider.volumes().await?.value, wanted)?.clone()),
        None => None,
    };
    let cloud = input.cloud.unwrap_or(Cloud::Secure);
    let mut data_centers = input.data_centers.clone().unwrap_or_default();
    if let Some(volume) = &volume {
        if cloud == Cloud::Community {
            return Err(ToolError::invalid(
                "cloud",
                format!("network volumes, like {}, can be mounted in the secure cloud only", volume.id),
            ));
        }
        if !data_centers.is_empty() && !data_centers.contains(&volume.data_center) {
            return Err(ToolError::invalid(
                "data_centers",
                format!(
                    "the volume {} is in {}, which is not among {}; nothing was created",
                    volume.name,
                    volume.data_center,
                    data_centers.join(", ")
                ),
            )
            .hint("leave data_centers out, or take a volume there (list_volumes)"));
        }
        data_centers = vec![volume.data_center.clone()];
    }
    if input.image.is_some() && input.template.is_some() {
        return Err(ToolError::invalid("template", "expected an image or a template, not both"));
    }
    let gpu_count = input.gpu_count.unwrap_or(1);
    let gpus = input.gpus.clone().unwrap_or_default();
    let catalog = provider.gpus(gpu_count, cloud).await?.value;
    let wishes = Wishes {
        gpus: &gpus,
        gpu_count,
        min_vram_gb: input.min_vram_gb,
        max_price_per_hour: input.max_price_per_hour,
        confirm_price: input.confirm_price,
        cloud,
        data_centers: &data_centers,
        has_volume: volume.is_some(),
        limits,
    };
    let named = wishes.named(&catalog)?;
    let candidates = placement::candidates(&catalog, &wishes)?;
    let mut ports = vec!["22/tcp".to_owned()];
    if input.expose_http {
        ports.push(format!("{COMFY_PORT}/http"));
    }
    let image = match (&input.image, &input.template) {
        (Some(image), _) => image.clone(),
        (None, Some(_)) => String::new(),
        (None, None) => DEFAULT_IMAGE.to_owned(),
    };
    let request = PodRequest {
        image,
        template: input.template.clone(),
        registry: input.registry.clone(),
        gpus: named.iter().map(|gpu| gpu.id.clone()).collect(),
        min_vram_gb: wishes.least_vram(),
        gpu_count,
        min_cuda: min_cuda(input)?,
        cloud,
        data_centers,
        disk_gb: input.disk_gb.unwrap_or(DEFAULT_DISK_GB),
        volume_name: volume.as_ref().map(|volume| volume.name.clone()),
        volume: volume.map(|volume| VolumeMount { volume_id: volume.id, path }),
        ports,
        env: environment(input)?,
    };
    Ok(Resolved { request, candidates })
}

fn mount_path(services: &Services, input: &CreateInput) -> Result<String, ToolError> {
    let config = services.config()?;
    let path = input.mount_path.clone().or_else(|| config.default_volume_mount.clone());
    let path = path.unwrap_or_else(|| DEFAULT_MOUNT.to_owned());
    let is_plain =
        path.starts_with('/') && path.trim() == path && !path.contains("..") && !path.contains(char::is_control);
    // There it would cover what the pod needs to run.
    let top = path.split('/').find(|part| !part.is_empty());
    if is_plain && top.is_some_and(|top| !SYSTEM_FOLDERS.contains(&top)) {
        return Ok(path);
    }
    Err(ToolError::invalid(
        "mount_path",
        format!("expected an absolute path inside the pod, outside of its system's folders, not `{path}`"),
    )
    .hint("`/workspace` is where most images look"))
}

fn min_cuda(input: &CreateInput) -> Result<Option<String>, ToolError> {
    let is_version = |text: &String| {
        let parts: Vec<_> = text.split('.').collect();
        parts.len() == 2 && parts.iter().all(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_digit()))
    };
    match &input.min_cuda {
        Some(text) if !is_version(text) => {
            Err(ToolError::invalid("min_cuda", format!("expected a version like `12.4`, not `{text}`")))
        }
        version => Ok(version.clone()),
    }
}

fn environment(input: &CreateInput) -> Result<BTreeMap<String, EnvValue>, ToolError> {
    let mut environment = BTreeMap::new();
    for (name, value) in input.env.iter().flatten() {
        let is_name = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        if !is_name || value.contains('\0') {
            return Err(ToolError::invalid("env", format!("`{name}` can't be a variable of an environment")));
        }
        if OURS.contains(&name.as_str()) || name.starts_with("RUNPOD_") {
            return Err(ToolError::invalid("env", format!("`{name}` is set by this program or by RunPod")));
        }
        environment.insert(name.clone(), EnvValue::Clear(value.clone()));
    }
    Ok(environment)
}
