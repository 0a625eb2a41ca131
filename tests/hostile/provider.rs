//! Two providers that no test server could be: one whose names are full of escape sequences, one that never answers.

use async_trait::async_trait;
use autopod_mcp::provider::{
    Cloud, GpuProvider, GpuType, LogLimits, LogLine, LogPage, LogQuery, LogStream, Pod, PodAction, PodBill, PodSpec,
    PodStatus, ProviderError, Stamped, Stock, Volume, VolumeSpec,
};
use jiff::Timestamp;

const NAME: &str = "a\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m\r\u{202e}b";

#[derive(Debug)]
pub struct Hostile;

#[derive(Debug)]
pub struct Stalling;

fn stamped<T>(value: T) -> Result<Stamped<T>, ProviderError> {
    Ok(Stamped { value, date: None })
}

fn refused<T>() -> Result<T, ProviderError> {
    Err(ProviderError::Refused { detail: NAME.to_owned() })
}

fn pod() -> Pod {
    Pod {
        id: "p1".to_owned(),
        name: NAME.to_owned(),
        status: PodStatus::Running,
        actions: Vec::new(),
        image: NAME.to_owned(),
        gpu: Some(NAME.to_owned()),
        gpu_count: u32::MAX,
        cloud: None,
        data_center: Some(NAME.to_owned()),
        disk_gb: u32::MAX,
        volume: None,
        ports: vec![NAME.to_owned()],
        env: Default::default(),
        cost_per_hour: f64::MAX,
        created_at: None,
        started_at: None,
        ssh: None,
        has_ssh_proxy: true,
        uptime_seconds: Some(u64::MAX),
        registry: Some(NAME.to_owned()),
        cuda: Some(NAME.to_owned()),
        locked: true,
    }
}

#[async_trait]
impl GpuProvider for Hostile {
    async fn create_pod(&self, _: &PodSpec) -> Result<Stamped<Pod>, ProviderError> {
        refused()
    }
    async fn pod(&self, _: &str) -> Result<Stamped<Pod>, ProviderError> {
        stamped(pod())
    }
    async fn pods(&self) -> Result<Stamped<Vec<Pod>>, ProviderError> {
        stamped(vec![pod()])
    }
    async fn control_pod(&self, _: &str, _: PodAction) -> Result<Stamped<Pod>, ProviderError> {
        refused()
    }
    async fn delete_pod(&self, _: &str) -> Result<Stamped<()>, ProviderError> {
        refused()
    }
    async fn volumes(&self) -> Result<Stamped<Vec<Volume>>, ProviderError> {
        let (id, name, data_center) = ("v1".to_owned(), NAME.to_owned(), NAME.to_owned());
        stamped(vec![Volume { id, name, size_gb: u32::MAX, data_center, tier: None }])
    }
    async fn create_volume(&self, _: &VolumeSpec) -> Result<Stamped<Volume>, ProviderError> {
        refused()
    }
    async fn grow_volume(&self, _: &str, _: u32) -> Result<Stamped<Volume>, ProviderError> {
        refused()
    }
    async fn gpus(&self, _: u32, _: Cloud) -> Result<Stamped<Vec<GpuType>>, ProviderError> {
        stamped(vec![GpuType {
            id: NAME.to_owned(),
            name: NAME.to_owned(),
            vram_gb: u32::MAX,
            secure_price: Some(f64::MAX),
            community_price: Some(-1.0),
            max_count_secure: u32::MAX,
            max_count_community: u32::MAX,
            stock: Stock::High,
            data_centers: vec![(NAME.to_owned(), Stock::Low)],
        }])
    }
    async fn ssh_keys(&self) -> Result<Stamped<Vec<String>>, ProviderError> {
        stamped(vec![NAME.to_owned()])
    }
    async fn delete_volume(&self, _: &str) -> Result<Stamped<()>, ProviderError> {
        refused()
    }
    async fn pod_logs(&self, _: &str, _: &LogQuery, _: &LogLimits) -> Result<LogPage, ProviderError> {
        Ok(LogPage { lines: vec![LogLine { at: None, source: None, text: NAME.to_owned() }], more: true })
    }
    async fn follow_logs(&self, _: &str, _: &LogQuery) -> Result<LogStream, ProviderError> {
        refused()
    }
    async fn billing(&self, _: Timestamp, _: Option<Timestamp>) -> Result<Stamped<Vec<PodBill>>, ProviderError> {
        let pod_id = NAME.to_owned();
        stamped(vec![PodBill { pod_id, total_usd: f64::MAX, gpu_usd: -1.0, disk_usd: f64::MAX }])
    }
}

#[async_trait]
impl GpuProvider for Stalling {
    async fn create_pod(&self, _: &PodSpec) -> Result<Stamped<Pod>, ProviderError> {
        std::future::pending().await
    }
    async fn pod(&self, _: &str) -> Result<Stamped<Pod>, ProviderError> {
        std::future::pending().await
    }
    async fn pods(&self) -> Result<Stamped<Vec<Pod>>, ProviderError> {
        std::future::pending().await
    }
    async fn control_pod(&self, _: &str, _: PodAction) -> Result<Stamped<Pod>, ProviderError> {
        std::future::pending().await
    }
    async fn delete_pod(&self, _: &str) -> Result<Stamped<()>, ProviderError> {
        std::future::pending().await
    }
    async fn volumes(&self) -> Result<Stamped<Vec<Volume>>, ProviderError> {
        std::future::pending().await
    }
    async fn create_volume(&self, _: &VolumeSpec) -> Result<Stamped<Volume>, ProviderError> {
        std::future::pending().await
    }
    async fn grow_volume(&self, _: &str, _: u32) -> Result<Stamped<Volume>, ProviderError> {
        std::future::pending().await
    }
    async fn gpus(&self, _: u32, _: Cloud) -> Result<Stamped<Vec<GpuType>>, ProviderError> {
        std::future::pending().await
    }
    async fn ssh_keys(&self) -> Result<Stamped<Vec<String>>, ProviderError> {
        std::future::pending().await
    }
    async fn delete_volume(&self, _: &str) -> Result<Stamped<()>, ProviderError> {
        std::future::pending().await
    }
    async fn pod_logs(&self, _: &str, _: &LogQuery, _: &LogLimits) -> Result<LogPage, ProviderError> {
        std::future::pending().await
    }
    async fn follow_logs(&self, _: &str, _: &LogQuery) -> Result<LogStream, ProviderError> {
        std::future::pending().await
    }
    async fn billing(&self, _: Timestamp, _: Option<Timestamp>) -> Result<Stamped<Vec<PodBill>>, ProviderError> {
        std::future::pending().await
    }
}
