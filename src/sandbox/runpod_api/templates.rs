//! Pod templates and registry credentials: a few that every world has, to list and to create pods from.

use serde_json::{Map, Value, json};

use super::validation::Parameters;
use super::{Answer, Call, Problem};

/// The account's one credential for private images.
const REGISTRY: (&str, &str) = ("6n2k8v4d", "dockerhub-private");

/// Settings a pod can be created from.
struct Template {
    id: &'static str,
    name: &'static str,
    image: &'static str,
    disk_gb: u32,
    ports: &'static [&'static str],
    env: &'static [(&'static str, &'static str)],
    allowed_cuda: &'static [&'static str],
    start_jupyter: bool,
    serverless: bool,
    /// In the public catalog instead of the account.
    public: bool,
}

static TEMPLATES: &[Template] = &[
    Template {
        id: "c0mfyt3mpl",
        name: "ComfyUI",
        image: "runpod/comfyui:latest",
        disk_gb: 60,
        ports: &["22/tcp", "8188/http"],
        env: &[("COMFYUI_ARGS", "--preview-method auto")],
        allowed_cuda: &["13.0"],
        start_jupyter: false,
        serverless: false,
        public: false,
    },
    Template {
        id: "w0rk3rt3mp",
        name: "ComfyUI worker",
        image: "runpod/worker-comfyui:latest",
        disk_gb: 20,
        ports: &[],
        env: &[],
        allowed_cuda: &[],
        start_jupyter: false,
        serverless: true,
        public: false,
    },
    Template {
        id: "30zmvf89kd",
        name: "PyTorch 2.8",
        image: "runpod/pytorch:1.0.2-cu1281-torch280-ubuntu2404",
        disk_gb: 50,
        ports: &["8888/http", "22/tcp"],
        env: &[],
        allowed_cuda: &[],
        start_jupyter: true,
        serverless: false,
        public: true,
    },
];

pub fn list(call: &Call) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    Ok(listed(|template| !template.public))
}

pub fn list_public(call: &Call) -> Result<Answer, Problem> {
    let mut parameters = Parameters::new(call, &["source"]);
    let source = parameters.choice("source", &["official", "verified", "community"]);
    parameters.violations.check()?;
    Ok(listed(|template| template.public && source.is_none_or(|source| source == "official")))
}

pub fn get(call: &Call, id: &str) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    Ok(Answer::ok(find(id)?.view()))
}

pub fn list_registries(call: &Call) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    Ok(Answer::ok(json!({ "registries": [registry()] })))
}

pub fn get_registry(call: &Call, id: &str) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    check_registry(id)?;
    Ok(Answer::ok(registry()))
}

pub fn check_registry(id: &str) -> Result<(), Problem> {
    if id == REGISTRY.0 { Ok(()) } else { Err(Problem::new(404, format!("registry '{id}' not found"))) }
}

/// The body of a create as if the template's settings had been sent in it, where it doesn't have its own.
pub fn filled_in(body: &Map<String, Value>, id: &str) -> Result<Value, Problem> {
    let template = find(id)?;
    if template.serverless {
        return Err(Problem::invalid(vec![format!("$.templateId: '{id}' is a serverless template")]));
    }
    let mut filled = json!({
        "image": template.image,
        "disk": template.disk_gb,
        "ports": template.ports,
        "startSsh": true,
        "startJupyter": template.start_jupyter,
    });
    for (key, value) in body {
        filled[key] = value.clone();
    }
    let mut env = template.env_view();
    env.extend(body.get("env").and_then(Value::as_object).into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())));
    filled["env"] = Value::Object(env);
    if let Some(gpu) = filled.get_mut("gpu").and_then(Value::as_object_mut)
        && !gpu.contains_key("allowedCudaVersions")
        && !gpu.contains_key("minCudaVersion")
    {
        gpu.insert("allowedCudaVersions".to_owned(), json!(template.allowed_cuda));
    }
    Ok(filled)
}

fn listed(wanted: impl Fn(&Template) -> bool) -> Answer {
    let views = TEMPLATES.iter().filter(|template| wanted(template)).map(Template::view);
    Answer::ok(json!({ "templates": views.collect::<Vec<_>>() }))
}

fn find(id: &str) -> Result<&'static Template, Problem> {
    TEMPLATES.iter().find(|template| template.id == id).ok_or_else(|| Problem::new(404, "template not found"))
}

fn registry() -> Value {
    json!({ "id": REGISTRY.0, "name": REGISTRY.1 })
}

impl Template {
    fn env_view(&self) -> Map<String, Value> {
        self.env.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect()
    }

    fn view(&self) -> Value {
        json!({
            "id": self.id,
            "name": self.name,
            "image": self.image,
            "args": "",
            "disk": self.disk_gb,
            "mounts": {},
            "ports": self.ports,
            "env": self.env_view(),
            "registry": null,
            "serverless": self.serverless,
            "public": self.public,
            "category": "NVIDIA",
            "startSsh": true,
            "startJupyter": self.start_jupyter,
            "allowedCudaVersions": self.allowed_cuda,
        })
    }
}
