//! What was asked for, resolved: two creates by one name with equal requests mean the same pod.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::provider::{Cloud, Pod, VolumeMount};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodRequest {
    pub image: String,
    /// Stands for an image and its settings; then `image` is empty.
    #[serde(default)]
    pub template: Option<String>,
    /// The provider's id of the credentials for a private image.
    #[serde(default)]
    pub registry: Option<String>,
    pub gpus: Vec<String>,
    #[serde(default)]
    pub min_vram_gb: u32,
    pub gpu_count: u32,
    #[serde(default)]
    pub min_cuda: Option<String>,
    pub cloud: Cloud,
    pub data_centers: Vec<String>,
    pub disk_gb: u32,
    pub volume: Option<VolumeMount>,
    pub volume_name: Option<String>,
    pub ports: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, EnvValue>,
}

/// A value of the pod's environment, which may be a secret: it stands in the records only until it was sent.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EnvValue {
    Clear(String),
    /// What is left of it to compare by.
    Sent(String),
}

impl EnvValue {
    fn fingerprint(&self, salt: &str) -> String {
        match self {
            Self::Clear(value) => {
                let salted = format!("{salt} {value}");
                uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_URL, salted.as_bytes()).simple().to_string()
            }
            Self::Sent(fingerprint) => fingerprint.clone(),
        }
    }
}

/// Written by hand, so that no value gets into a log.
impl std::fmt::Debug for EnvValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

impl PodRequest {
    /// The request that would have made this pod, as far as it can be told.
    pub fn of_existing(pod: &Pod) -> Self {
        Self {
            image: pod.image.clone(),
            template: None,
            registry: None,
            gpus: pod.gpu.iter().cloned().collect(),
            min_vram_gb: 0,
            gpu_count: pod.gpu_count,
            min_cuda: None,
            cloud: pod.cloud.unwrap_or(Cloud::Secure),
            data_centers: pod.data_center.iter().cloned().collect(),
            disk_gb: pod.disk_gb,
            volume: pod.volume.clone(),
            volume_name: None,
            ports: pod.ports.clone(),
            env: BTreeMap::new(),
        }
    }

    /// Takes the environment's values out, leaving what tells equal ones. `salt` keeps a short value from being found
    /// out by trying.
    pub fn forget_env_values(&mut self, salt: &str) {
        for value in self.env.values_mut() {
            *value = EnvValue::Sent(value.fingerprint(salt));
        }
    }

    /// The fields in which another request differs, in words. `salt` is that of this request's forgotten values.
    pub fn differences(&self, salt: &str, other: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut compare = |field: &str, mine: String, theirs: String| {
            if mine != theirs {
                differences.push(format!("{field}: {mine} there, {theirs} asked"));
            }
        };
        let volume = |request: &Self| match &request.volume {
            Some(mount) => format!("{} at {}", mount.volume_id, mount.path),
            None => "none".to_owned(),
        };
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
        compare("image", self.image.clone(), other.image.clone());
        compare("template", or_none(&self.template), or_none(&other.template));
        compare("registry", or_none(&self.registry), or_none(&other.registry));
        compare("gpus", list(&self.gpus), list(&other.gpus));
        compare("min_vram_gb", self.min_vram_gb.to_string(), other.min_vram_gb.to_string());
        compare("gpu_count", self.gpu_count.to_string(), other.gpu_count.to_string());
        compare("min_cuda", or_none(&self.min_cuda), or_none(&other.min_cuda));
        compare("cloud", format!("{:?}", self.cloud), format!("{:?}", other.cloud));
        compare("data_centers", list(&self.data_centers), list(&other.data_centers));
        compare("disk_gb", self.disk_gb.to_string(), other.disk_gb.to_string());
        compare("volume", volume(self), volume(other));
        compare("ports", list(&self.ports), list(&other.ports));
        let names: std::collections::BTreeSet<_> = self.env.keys().chain(other.env.keys()).collect();
        let value = |request: &Self, name: &str| request.env.get(name).map(|value| value.fingerprint(salt));
        for name in names.into_iter().filter(|name| value(self, name) != value(other, name)) {
            // The values stay unsaid.
            differences.push(match (self.env.contains_key(name), other.env.contains_key(name)) {
                (true, false) => format!("env: {name} there, not asked"),
                (false, _) => format!("env: {name} asked, not there"),
                (true, true) => format!("env: another value of {name}"),
            });
        }
        differences
    }
}

#[cfg(test)]
impl PodRequest {
    pub(crate) fn for_tests() -> Self {
        Self {
            image: "image".to_owned(),
            template: None,
            registry: None,
            gpus: Vec::new(),
            min_vram_gb: 16,
            gpu_count: 1,
            min_cuda: None,
            cloud: Cloud::Secure,
            data_centers: Vec::new(),
            disk_gb: 40,
            volume: None,
            volume_name: None,
            ports: Vec::new(),
            env: BTreeMap::new(),
        }
    }
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "any".to_owned() } else { items.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(env: &[(&str, &str)]) -> PodRequest {
        let clear = |(name, value): &(&str, &str)| ((*name).to_owned(), EnvValue::Clear((*value).to_owned()));
        PodRequest { env: env.iter().map(clear).collect(), ..PodRequest::for_tests() }
    }

    #[test]
    fn an_environment_is_compared_after_its_values_were_forgotten_and_never_told() {
        let mut made = asking(&[("TOKEN", "s3cret"), ("MODE", "fast")]);
        made.forget_env_values("salt");
        made.forget_env_values("salt");
        assert!(made.differences("salt", &asking(&[("TOKEN", "s3cret"), ("MODE", "fast")])).is_empty());
        let told = made.differences("salt", &asking(&[("TOKEN", "other!"), ("NEW", "1")])).join("; ");
        assert_eq!(told, "env: MODE there, not asked; env: NEW asked, not there; env: another value of TOKEN");
        let written = format!("{} {made:?}", serde_json::to_string(&made).expect("JSON"));
        assert!(!written.contains("s3cret"), "{written}");
    }
}
