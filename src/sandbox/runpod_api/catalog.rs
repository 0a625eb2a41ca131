//! The catalog: GPU types with price and stock, data centers.

use serde_json::{Value, json};

use super::validation::{Parameters, cuda_number, is_cuda_version};
use super::{Answer, Call, Problem};
use crate::sandbox::catalog::{self, CUDA_VERSIONS, Cloud, DATA_CENTERS, DataCenter, GPUS, Gpu};
use crate::sandbox::world::{State, World};

/// Parameters that mean something only when stock is asked for.
const STOCK_PARAMETERS: &[&str] = &["product", "count", "cloud", "countryCodes", "cudaVersions", "minCudaVersion"];

const REGIONS: &[&str] =
    &["NORTH_AMERICA", "SOUTH_AMERICA", "EUROPE", "ASIA", "MIDDLE_EAST", "AFRICA", "OCEANIA", "ANTARCTICA", "UNKNOWN"];

pub async fn list_gpus(world: &World, call: &Call) -> Result<Answer, Problem> {
    let wanted = GpuQuery::read(call)?;
    let state = world.state().await;
    let listed = GPUS.iter().filter(|gpu| wanted.in_countries(gpu, &state));
    let gpus: Vec<Value> = listed.map(|gpu| wanted.view(gpu, &state)).collect();
    Ok(Answer::ok(json!({ "gpus": gpus })))
}

pub async fn get_gpu(world: &World, call: &Call, id: &str) -> Result<Answer, Problem> {
    let wanted = GpuQuery::read(call)?;
    let gpu = catalog::find_gpu(id).ok_or_else(|| Problem::new(404, "GPU type not found"))?;
    Ok(Answer::ok(wanted.view(gpu, &*world.state().await)))
}

pub async fn list_data_centers(world: &World, call: &Call) -> Result<Answer, Problem> {
    let known = &["include", "regions", "networkVolumeTypes", "compliance", "globalNetwork"];
    let mut parameters = Parameters::new(call, known);
    let with_gpus = data_center_include(&mut parameters);
    let regions = parameters.list("regions", |region| REGIONS.contains(&region));
    let tiers = parameters.list("networkVolumeTypes", |tier| ["STANDARD", "HIGH_PERFORMANCE"].contains(&tier));
    let compliance = parameters.list("compliance", |_| true);
    let global_network = parameters.boolean("globalNetwork");
    parameters.violations.check()?;
    let state = world.state().await;
    let listed = DATA_CENTERS.iter().filter(|center| {
        (regions.is_empty() || regions.contains(&center.region))
            && tiers.iter().all(|tier| center.volume_types.contains(tier))
            && compliance.iter().all(|certificate| center.compliance.contains(certificate))
            && global_network.is_none_or(|wanted| wanted == center.global_network)
    });
    let centers: Vec<Value> = listed.map(|center| data_center_view(center, with_gpus, &state)).collect();
    Ok(Answer::ok(json!({ "dataCenters": centers })))
}

pub async fn get_data_center(world: &World, call: &Call, id: &str) -> Result<Answer, Problem> {
    let mut parameters = Parameters::new(call, &["include"]);
    let with_gpus = data_center_include(&mut parameters);
    parameters.violations.check()?;
    let center = catalog::find_data_center(id).ok_or_else(|| Problem::new(404, "data center not found"))?;
    Ok(Answer::ok(data_center_view(center, with_gpus, &*world.state().await)))
}

/// Whether GPU stock is asked for. The world has no CPU flavors, so `CPU_AVAILABILITY` adds nothing.
fn data_center_include(parameters: &mut Parameters<'_>) -> bool {
    let include = parameters.list("include", |item| ["GPU_AVAILABILITY", "CPU_AVAILABILITY"].contains(&item));
    include.contains(&"GPU_AVAILABILITY")
}

fn data_center_view(center: &DataCenter, with_gpus: bool, state: &State) -> Value {
    let mut view = json!({
        "id": center.id,
        "name": center.name,
        "region": center.region,
        "globalNetwork": center.global_network,
        "networkVolumeTypes": center.volume_types,
        "compliance": center.compliance,
    });
    if with_gpus {
        let offered = GPUS.iter().filter(|gpu| offers(state, gpu, center.id, Cloud::Secure));
        let stock = offered.map(|gpu| {
            let free = state.free(gpu, center.id, Cloud::Secure);
            json!({ "id": gpu.id, "name": gpu.name, "availability": catalog::availability(free, 1) })
        });
        view["gpuAvailability"] = stock.collect();
    }
    view
}

fn offers(state: &State, gpu: &Gpu, center: &str, cloud: Cloud) -> bool {
    gpu.price(cloud).is_some() && state.stock.iter().any(|stock| stock.gpu == gpu.id && stock.data_center == center)
}

/// What is asked about GPU types.
struct GpuQuery {
    with_stock: bool,
    count: u32,
    cloud: Cloud,
    /// Any if empty.
    countries: Vec<String>,
    cuda: Vec<&'static str>,
}

impl GpuQuery {
    fn read(call: &Call) -> Result<Self, Problem> {
        let mut known = vec!["include"];
        known.extend_from_slice(STOCK_PARAMETERS);
        let mut parameters = Parameters::new(call, &known);
        let with_stock = !parameters.list("include", |item| item == "AVAILABILITY").is_empty();
        parameters.list("product", |item| ["POD", "CLUSTER", "SERVERLESS"].contains(&item));
        let count = parameters.integer("count", 1, 1_000).unwrap_or(1);
        let cloud = parameters.choice("cloud", &["SECURE", "COMMUNITY"]);
        let is_country = |code: &str| code.len() == 2 && code.bytes().all(|letter| letter.is_ascii_uppercase());
        let countries = parameters.list("countryCodes", is_country);
        let exactly = parameters.list("cudaVersions", is_cuda_version);
        let least = parameters.text("minCudaVersion").map(|text| (text, cuda_number(text)));
        if let Some((text, None)) = least {
            parameters.violations.add("query.minCudaVersion", format_args!("'{text}' is not a CUDA version"));
        }
        let stray = STOCK_PARAMETERS.iter().find(|name| parameters.has(name));
        let has_product = parameters.has("product");
        parameters.violations.check()?;
        if with_stock && !has_product {
            return Err(Problem::new(400, "include=AVAILABILITY requires product"));
        }
        if let Some(stray) = stray.filter(|_| !with_stock) {
            return Err(Problem::new(400, format!("{stray} is valid only with include=AVAILABILITY")));
        }
        if !exactly.is_empty() && least.is_some() {
            return Err(Problem::new(400, "cudaVersions and minCudaVersion are mutually exclusive"));
        }
        let cuda = CUDA_VERSIONS.iter().filter(|version| {
            (exactly.is_empty() || exactly.contains(version))
                && least.is_none_or(|(_, least)| cuda_number(version) >= least)
        });
        Ok(Self {
            with_stock,
            count,
            cloud: if cloud == Some("COMMUNITY") { Cloud::Community } else { Cloud::Secure },
            countries: countries.into_iter().map(str::to_owned).collect(),
            cuda: cuda.copied().collect(),
        })
    }

    fn centers<'a>(&'a self, gpu: &'a Gpu, state: &'a State) -> impl Iterator<Item = &'static DataCenter> + 'a {
        DATA_CENTERS.iter().filter(|center| {
            (self.countries.is_empty() || self.countries.iter().any(|code| code == center.country))
                && offers(state, gpu, center.id, self.cloud)
        })
    }

    fn in_countries(&self, gpu: &Gpu, state: &State) -> bool {
        self.countries.is_empty() || self.centers(gpu, state).next().is_some()
    }

    fn view(&self, gpu: &Gpu, state: &State) -> Value {
        let most = |price: Option<f64>| if price.is_some() { gpu.max_count } else { 0 };
        let mut view = json!({
            "id": gpu.id,
            "name": gpu.name,
            "pool": gpu.pool,
            "manufacturer": "NVIDIA",
            "memory": gpu.memory_gb,
            "secure": gpu.secure_price.is_some(),
            "community": gpu.community_price.is_some(),
            "price": { "secure": gpu.secure_price.unwrap_or(0.0), "community": gpu.community_price.unwrap_or(0.0) },
            "maxCount": { "secure": most(gpu.secure_price), "community": most(gpu.community_price) },
        });
        if self.with_stock {
            self.add_stock(&mut view, gpu, state);
        }
        view
    }

    fn add_stock(&self, view: &mut Value, gpu: &Gpu, state: &State) {
        let fits = self.count <= gpu.max_count && !self.cuda.is_empty();
        let free: Vec<(&DataCenter, u32)> = self
            .centers(gpu, state)
            .map(|center| (center, if fits { state.free(gpu, center.id, self.cloud) } else { 0 }))
            .collect();
        // A pod runs in one data center, so the best one is what the GPU type as a whole has to offer.
        let best = free.iter().map(|(_, free)| *free).max().unwrap_or(0);
        let overall = catalog::availability(best, self.count);
        view["availability"] = json!(overall);
        if overall != "NONE" {
            let centers = free.iter().map(|(center, free)| {
                let level = catalog::availability(*free, self.count);
                json!({ "id": center.id, "name": center.name, "availability": level })
            });
            view["dataCenters"] = centers.collect();
        }
        let versions = self.cuda.iter().map(|version| json!({ "version": version, "available": overall != "NONE" }));
        view["cudaVersions"] = versions.collect();
    }
}
