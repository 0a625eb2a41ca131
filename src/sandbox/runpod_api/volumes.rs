//! Network volumes: list, create, get, update (which only grows), delete.

use super::pods::Page;
use super::validation::{Parameters, Violations};
use super::{Answer, Call, Problem};
use crate::sandbox::catalog;
use crate::sandbox::world::{Volume, World, new_id};

const TIERS: &[&str] = &["STANDARD", "HIGH_PERFORMANCE"];
const LEAST_GB: u32 = 10;
const MOST_GB: u32 = 4096;

pub async fn list(world: &World, call: &Call) -> Result<Answer, Problem> {
    let mut parameters = Parameters::new(call, &["limit", "cursor"]);
    let page = Page::read(&mut parameters);
    parameters.violations.check()?;
    let state = world.state().await;
    page.answer("networkVolumes", state.volumes.values().map(|volume| (volume.id.as_str(), volume.view())).collect())
}

pub async fn create(world: &World, call: &Call) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    let mut violations = Violations::default();
    let known = &["name", "size", "dataCenter", "type"];
    let read = violations.object("$", call.json()?, known, &["name", "size", "dataCenter"]).map(|fields| {
        (
            fields.text(&mut violations, "name"),
            fields.integer(&mut violations, "size", LEAST_GB, MOST_GB),
            fields.text(&mut violations, "dataCenter"),
            fields.choice(&mut violations, "type", TIERS),
        )
    });
    violations.check()?;
    let Some((Some(name), Some(size_gb), Some(data_center), tier)) = read else {
        return Err(Problem::new(400, "request could not be processed"));
    };
    let center = catalog::find_data_center(&data_center)
        .ok_or_else(|| Problem::new(400, format!("unknown data center '{data_center}'")))?;
    let Some(primary) = center.volume_types.first() else {
        return Err(Problem::new(400, format!("data center {data_center} has no network volumes")));
    };
    let tier = tier.unwrap_or(primary);
    if !center.volume_types.contains(&tier) {
        return Err(Problem::new(400, format!("data center {data_center} has no {tier} volumes")));
    }
    let volume = Volume { id: new_id(10), name, size_gb, data_center: center.id, tier };
    let view = volume.view();
    world.state().await.volumes.insert(volume.id.clone(), volume);
    Ok(Answer::created(view))
}

pub async fn get(world: &World, call: &Call, id: &str) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    let state = world.state().await;
    Ok(Answer::ok(state.volumes.get(id).ok_or_else(unknown_volume)?.view()))
}

pub async fn update(world: &World, call: &Call, id: &str) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    let body = call.json()?;
    let mut violations = Violations::default();
    let read = violations.object("$", body, &["name", "size"], &[]).map(|fields| {
        (fields.text(&mut violations, "name"), fields.integer(&mut violations, "size", LEAST_GB, MOST_GB))
    });
    if body.as_object().is_some_and(|map| map.is_empty()) {
        violations.add("$", "minProperties: got 0, want 1");
    }
    violations.check()?;
    let mut state = world.state().await;
    let volume = state.volumes.get_mut(id).ok_or_else(unknown_volume)?;
    let (name, size_gb) = read.unwrap_or_default();
    if let Some(size_gb) = size_gb {
        if size_gb < volume.size_gb {
            let detail = format!("size can only grow: it is {} GB, {size_gb} GB was asked for", volume.size_gb);
            return Err(Problem::new(400, detail));
        }
        volume.size_gb = size_gb;
    }
    if let Some(name) = name {
        volume.name = name;
    }
    Ok(Answer::ok(volume.view()))
}

pub async fn delete(world: &World, call: &Call, id: &str) -> Result<Answer, Problem> {
    Parameters::none(call)?;
    let mut state = world.state().await;
    if !state.volumes.contains_key(id) {
        return Err(unknown_volume());
    }
    if state.volume_in_use(id) {
        return Err(Problem::new(400, "the network volume is attached to a pod; terminate the pod first"));
    }
    state.volumes.remove(id);
    if let Err(error) = std::fs::remove_dir_all(world.volume_folder(id))
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(id, %error, "a deleted volume's folder can't be removed");
    }
    Ok(Answer::no_content())
}

fn unknown_volume() -> Problem {
    Problem::new(404, "network volume not found")
}
