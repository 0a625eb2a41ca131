//! Pods going their way up, and down again. Each step happens at the moment it was due in the world's time, however far
//! the clock has leapt since.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::time::timeout;

use super::container::{Container, ContainerSpec};
use super::pod::{Mount, Pod, Stage};
use super::world::{State, World};

/// How long a container may take to close; the whole world waits meanwhile.
const CLOSING_TIME: Duration = Duration::from_secs(5);

impl World {
    /// Takes every step that is due by now, the earliest first.
    pub async fn drive(&self, state: &mut State) {
        // What still asks while the world ends must not bring up servers that nobody would end.
        if self.stopping.is_cancelled() {
            return;
        }
        let now = self.clock.now();
        while let Some(index) = next_due(state, now) {
            let pod = &mut state.pods[index];
            let at = pod.due().unwrap_or(now);
            match self.step(pod, at).await {
                Ok(stage) => pod.enter(stage, at),
                Err(error) => {
                    tracing::error!(pod = pod.id, %error, "the pod's servers can't be started");
                    pod.log(at, "system", format!("error: {error}"));
                    self.close_container(pod).await;
                    pod.enter(Stage::Failed, at);
                }
            }
        }
    }

    async fn step(&self, pod: &mut Pod, at: Timestamp) -> io::Result<Stage> {
        if pod.fails_at.take_if(|stage| *stage == pod.stage).is_some() {
            return Err(io::Error::other("the machine failed"));
        }
        match pod.stage {
            Stage::Allocating => {
                pod.has_machine = true;
                pod.log(at, "system", format!("create container {}", pod.config.image));
                Ok(Stage::Starting)
            }
            Stage::Starting => {
                let container = Container::start(self.container_spec(pod)?).await?;
                pod.ssh_port = Some(container.ssh_port());
                pod.container = Some(Arc::new(container));
                pod.container_starts += 1;
                if !pod.restarting {
                    pod.started_at = Some(at);
                }
                pod.restarting = false;
                pod.log(at, "system", "start container");
                Ok(Stage::ContainerUp)
            }
            Stage::ContainerUp => {
                let wants_ssh = pod.start_command_runs() && !pod.public_key().trim().is_empty();
                if let Some(container) = pod.container.clone()
                    && wants_ssh
                    && pod.exposes(22, false)
                {
                    container.open_ssh().await?;
                    pod.log(at, "container", "sshd listens on port 22");
                }
                Ok(Stage::SshUp)
            }
            Stage::SshUp => {
                if let Some(container) = pod.container.clone()
                    && pod.start_command_runs()
                {
                    container.open_comfy().await?;
                    pod.log(at, "container", "To see the GUI go to: http://0.0.0.0:8188");
                }
                Ok(Stage::ComfyUp)
            }
            stage @ (Stage::ComfyUp | Stage::Stopped | Stage::Failed) => Ok(stage),
        }
    }

    fn container_spec(&self, pod: &Pod) -> io::Result<ContainerSpec> {
        let folder = self.pod_folder(&pod.id).join("disk");
        let volume = match &pod.config.mount {
            None => None,
            Some(Mount::Network { volume_id, path }) => Some((self.volume_folder(volume_id), path.clone())),
            Some(Mount::Persistent { path, .. }) => Some((self.pod_folder(&pod.id).join("persistent"), path.clone())),
        };
        std::fs::create_dir_all(&folder)?;
        if let Some((host_folder, _)) = &volume {
            std::fs::create_dir_all(host_folder)?;
        }
        let mut env = pod.config.env.clone();
        env.insert("RUNPOD_POD_ID".to_owned(), pod.id.clone());
        env.insert("RUNPOD_API_KEY".to_owned(), pod.scoped_key.clone());
        env.insert("RUNPOD_DC_ID".to_owned(), pod.config.data_center.to_owned());
        env.insert("RUNPOD_GPU_COUNT".to_owned(), pod.config.gpu_count.to_string());
        Ok(ContainerSpec {
            pod_id: pod.id.clone(),
            address: pod.address,
            former_port: pod.ssh_port,
            folder,
            volume,
            authorized_keys: pod.public_key().to_owned(),
            env,
            namespaces: self.namespaces,
            comfyui: self.comfyui.clone(),
            gpu_name: pod.config.gpu.id.to_owned(),
            vram_gb: pod.config.gpu.memory_gb,
        })
    }

    /// Ends the container and wipes its disk, as RunPod does with every stop.
    pub async fn close_container(&self, pod: &mut Pod) {
        if let Some(container) = pod.container.take() {
            if timeout(CLOSING_TIME, container.stop()).await.is_err() {
                tracing::warn!(pod = pod.id, "the pod's servers didn't end within {CLOSING_TIME:?}");
            }
            pod.past_events.extend(container.events());
        }
        remove_folder(self.pod_folder(&pod.id).join("disk"));
    }

    pub async fn stop_pod(&self, pod: &mut Pod, at: Timestamp) {
        self.close_container(pod).await;
        pod.charge_stopped(at);
        pod.restarting = false;
        pod.log(at, "system", "stop container");
        pod.enter(Stage::Stopped, at);
    }

    pub async fn restart_pod(&self, pod: &mut Pod, at: Timestamp) {
        self.close_container(pod).await;
        pod.restarting = true;
        pod.log(at, "system", "restart container");
        pod.enter(Stage::Starting, at);
    }

    pub fn start_pod(&self, pod: &mut Pod, at: Timestamp) {
        pod.charge(at);
        pod.log(at, "system", "waiting for the machine");
        pod.enter(Stage::Allocating, at);
    }

    pub async fn end_pod(&self, pod: &mut Pod, at: Timestamp) {
        self.close_container(pod).await;
        pod.meter.stop(at);
        pod.ended_at = Some(at);
        remove_folder(self.pod_folder(&pod.id));
    }
}

fn next_due(state: &State, now: Timestamp) -> Option<usize> {
    let due = state.pods.iter().enumerate().filter_map(|(index, pod)| Some((pod.due()?, index)));
    due.filter(|(at, _)| *at <= now).min().map(|(_, index)| index)
}

fn remove_folder(folder: PathBuf) {
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(folder = %folder.display(), %error, "a pod's folder can't be removed");
        }
        _ => {}
    }
}
