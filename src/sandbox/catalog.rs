//! What the world rents out: GPU types with prices, data centers, and how many GPUs stand in each.

/// One GPU type as `GET /v2/catalog/gpus` lists it. A price of `None` means that cloud doesn't offer it.
#[derive(Debug)]
pub struct Gpu {
    /// What `gpu.id` of a create takes.
    pub id: &'static str,
    pub name: &'static str,
    pub pool: Option<&'static str>,
    pub memory_gb: u32,
    /// USD an hour for one GPU.
    pub secure_price: Option<f64>,
    pub community_price: Option<f64>,
    /// The most GPUs of this type that one machine has.
    pub max_count: u32,
}

#[derive(Debug)]
pub struct DataCenter {
    pub id: &'static str,
    pub name: &'static str,
    pub region: &'static str,
    pub country: &'static str,
    pub global_network: bool,
    pub volume_types: &'static [&'static str],
    pub compliance: &'static [&'static str],
}

/// How many GPUs of one type a data center has, rented or not.
#[derive(Debug, Clone)]
pub struct Stock {
    pub gpu: &'static str,
    pub data_center: &'static str,
    pub secure: u32,
    pub community: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cloud {
    Secure,
    Community,
}

impl Cloud {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Secure => "SECURE",
            Self::Community => "COMMUNITY",
        }
    }
}

impl Gpu {
    pub fn price(&self, cloud: Cloud) -> Option<f64> {
        match cloud {
            Cloud::Secure => self.secure_price,
            Cloud::Community => self.community_price,
        }
    }
}

/// Every machine of the world runs one of these; all GPU types have all of them.
pub const CUDA_VERSIONS: &[&str] = &["12.4", "12.8", "13.0"];

/// What a pod lands on when it asks for nothing.
pub const DEFAULT_CUDA: &str = "12.8";

const fn gpu(
    id: &'static str,
    name: &'static str,
    pool: Option<&'static str>,
    memory_gb: u32,
    prices: (Option<f64>, Option<f64>),
    max_count: u32,
) -> Gpu {
    Gpu { id, name, pool, memory_gb, secure_price: prices.0, community_price: prices.1, max_count }
}

pub static GPUS: &[Gpu] = &[
    gpu("NVIDIA GeForce RTX 3070", "RTX 3070", None, 8, (None, Some(0.13)), 4),
    gpu("NVIDIA RTX A4000", "RTX A4000", Some("AMPERE_16"), 16, (Some(0.25), Some(0.17)), 8),
    gpu("NVIDIA RTX A5000", "RTX A5000", Some("AMPERE_24"), 24, (Some(0.27), Some(0.16)), 8),
    gpu("NVIDIA L4", "L4", Some("AMPERE_24"), 24, (Some(0.43), None), 8),
    gpu("NVIDIA GeForce RTX 3090", "RTX 3090", Some("AMPERE_24"), 24, (Some(0.46), Some(0.22)), 8),
    gpu("NVIDIA GeForce RTX 4090", "RTX 4090", Some("ADA_24"), 24, (Some(0.69), Some(0.34)), 8),
    gpu("NVIDIA L40S", "L40S", Some("ADA_48_PRO"), 48, (Some(0.86), Some(0.79)), 8),
    gpu("NVIDIA A100 80GB PCIe", "A100 PCIe", Some("AMPERE_80"), 80, (Some(1.64), Some(1.19)), 8),
    gpu("NVIDIA H100 80GB HBM3", "H100 SXM", Some("HOPPER_80"), 80, (Some(2.99), Some(2.69)), 8),
];

pub static DATA_CENTERS: &[DataCenter] = &[
    DataCenter {
        id: "EU-RO-1",
        name: "EU Romania 1",
        region: "EUROPE",
        country: "RO",
        global_network: true,
        volume_types: &["STANDARD", "HIGH_PERFORMANCE"],
        compliance: &["GDPR", "ISO_IEC_27001", "SOC_2_TYPE_2"],
    },
    DataCenter {
        id: "US-KS-2",
        name: "US Kansas 2",
        region: "NORTH_AMERICA",
        country: "US",
        global_network: true,
        volume_types: &["STANDARD"],
        compliance: &["SOC_2_TYPE_2", "ISO_IEC_27001"],
    },
    DataCenter {
        id: "EUR-IS-1",
        name: "EUR Iceland 1",
        region: "EUROPE",
        country: "IS",
        global_network: false,
        volume_types: &["STANDARD"],
        compliance: &["GDPR", "ISO_IEC_27001", "RENEWABLE"],
    },
    DataCenter {
        id: "US-TX-3",
        name: "US Texas 3",
        region: "NORTH_AMERICA",
        country: "US",
        global_network: false,
        volume_types: &[],
        compliance: &["SOC_2_TYPE_2"],
    },
];

const fn stock(gpu: &'static str, data_center: &'static str, secure: u32, community: u32) -> Stock {
    Stock { gpu, data_center, secure, community }
}

/// The stock that every world starts with. The H100 is sold out everywhere, so that a newcomer meets that too.
pub fn initial_stock() -> Vec<Stock> {
    vec![
        stock("NVIDIA GeForce RTX 3070", "US-TX-3", 0, 12),
        stock("NVIDIA RTX A4000", "EU-RO-1", 40, 16),
        stock("NVIDIA RTX A4000", "US-TX-3", 24, 8),
        stock("NVIDIA RTX A5000", "US-KS-2", 16, 8),
        stock("NVIDIA RTX A5000", "EUR-IS-1", 4, 0),
        stock("NVIDIA L4", "EU-RO-1", 6, 0),
        stock("NVIDIA L4", "EUR-IS-1", 16, 0),
        stock("NVIDIA GeForce RTX 3090", "EU-RO-1", 2, 12),
        stock("NVIDIA GeForce RTX 3090", "US-KS-2", 6, 12),
        stock("NVIDIA GeForce RTX 4090", "EU-RO-1", 32, 8),
        stock("NVIDIA GeForce RTX 4090", "US-KS-2", 32, 8),
        stock("NVIDIA GeForce RTX 4090", "US-TX-3", 16, 8),
        stock("NVIDIA L40S", "EU-RO-1", 8, 0),
        stock("NVIDIA L40S", "US-KS-2", 2, 2),
        stock("NVIDIA A100 80GB PCIe", "EU-RO-1", 8, 0),
        stock("NVIDIA A100 80GB PCIe", "US-TX-3", 16, 4),
        stock("NVIDIA H100 80GB HBM3", "US-TX-3", 0, 0),
    ]
}

pub fn find_gpu(id: &str) -> Option<&'static Gpu> {
    GPUS.iter().find(|gpu| gpu.id == id)
}

pub fn find_data_center(id: &str) -> Option<&'static DataCenter> {
    DATA_CENTERS.iter().find(|center| center.id == id)
}

/// The level that the catalog names for so many free GPUs, when each pod wants `count` of them.
pub fn availability(free: u32, count: u32) -> &'static str {
    match free / count.max(1) {
        0 => "NONE",
        1..=2 => "LOW",
        3..=7 => "MEDIUM",
        _ => "HIGH",
    }
}
