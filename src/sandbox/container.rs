//! What runs "inside" a pod of the sandbox: a real SSH server and a ComfyUI-compatible server.
//!
//! The SSH port is the only thing bound on the host. ComfyUI has no TCP port at all: it takes its connections from
//! memory, so that nothing but a forward of this pod's own SSH server (or the sandbox's HTTP proxy, through
//! [`Container::connect`]) can reach it.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::io::DuplexStream;
use tokio::net::TcpSocket;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::comfy_api::{Comfy, ComfySettings};
use super::ssh_server;

pub(super) mod isolation;
pub(super) mod log;
pub(super) mod network;

use isolation::{Inside, Isolation};
use log::EventLog;
use network::{Network, Via};

/// The port on which ComfyUI listens inside a pod.
const COMFY_PORT: u16 = 8188;
/// How many connections may wait to be accepted by the SSH server.
const SSH_BACKLOG: u32 = 1024;
/// How long [`Container::stop`] waits for tasks that were told to end.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// What a container is made of. Everything in it comes from the pod's create request or the sandbox's world.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// Named in every entry of the event log.
    pub pod_id: String,
    /// Where its ports are on this machine; a loopback address.
    pub address: Ipv4Addr,
    /// The SSH port it must not have: that of the pod's start before, since each start has another.
    pub former_port: Option<u16>,
    /// The container's disk: made when missing, removed by [`Container::stop`].
    pub folder: PathBuf,
    /// Host folder of the network volume and its mount path inside.
    pub volume: Option<(PathBuf, String)>,
    /// `PUBLIC_KEY`: OpenSSH public keys, one a line.
    pub authorized_keys: String,
    /// The environment of the pod's process 1. As in a real container, commands run over SSH don't inherit it.
    pub env: BTreeMap<String, String>,
    /// Whether to try to run commands in namespaces of their own; without them no command runs.
    pub namespaces: bool,
    /// URL of a real ComfyUI that is to stand behind the pod instead of ours.
    pub comfyui: Option<String>,
    /// What `/system_stats` reports.
    pub gpu_name: String,
    /// In GiB.
    pub vram_gb: u32,
}

/// One running container. Dropping it ends everything in it too, but only [`Container::stop`] waits for that and
/// removes the folder.
pub struct Container {
    spec: ContainerSpec,
    ssh_port: u16,
    /// Bound from the start, so that the port belongs to this pod, but without a listener, so that it refuses.
    reserved: Mutex<Option<TcpSocket>>,
    network: Network,
    log: EventLog,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Container {
    /// Makes the disk and reserves the SSH port. Nothing answers yet.
    pub async fn start(spec: ContainerSpec) -> io::Result<Container> {
        for folder in ["input", "output", "temp"] {
            tokio::fs::create_dir_all(spec.folder.join("ComfyUI").join(folder)).await?;
        }
        // Mount points are compared with it, so it has to be the one real path.
        let spec = ContainerSpec { folder: tokio::fs::canonicalize(&spec.folder).await?, ..spec };
        let mut socket = free_port(spec.address)?;
        while Some(socket.local_addr()?.port()) == spec.former_port {
            // While it is held, the next one is another.
            let former = socket;
            socket = free_port(spec.address)?;
            drop(former);
        }
        let stop = CancellationToken::new();
        let tasks = TaskTracker::new();
        Ok(Container {
            ssh_port: socket.local_addr()?.port(),
            reserved: Mutex::new(Some(socket)),
            network: Network::new(stop.clone(), tasks.clone()),
            log: EventLog::new(spec.pod_id.clone()),
            stop,
            tasks,
            spec,
        })
    }

    pub fn ssh_port(&self) -> u16 {
        self.ssh_port
    }

    /// The SSH server answers from here on, with a host key that no container had before, and the processes behind it
    /// are started. A second call changes nothing.
    pub async fn open_ssh(&self) -> io::Result<()> {
        let Some(socket) = self.reserved.lock().unwrap_or_else(PoisonError::into_inner).take() else { return Ok(()) };
        let config = ssh_server::config().map_err(io::Error::other)?;
        let listener = socket.listen(SSH_BACKLOG)?;
        let inside = Inside {
            disk: self.spec.folder.clone(),
            volume: self.spec.volume.clone(),
            env: self.spec.env.clone(),
            namespaces: self.spec.namespaces,
        };
        let pod = ssh_server::Pod {
            isolation: Isolation::start(inside, self.log.clone(), self.stop.clone(), &self.tasks),
            authorized_keys: ssh_server::parse_authorized_keys(&self.spec.authorized_keys),
            network: self.network.clone(),
            log: self.log.clone(),
            stop: self.stop.clone(),
            tasks: self.tasks.clone(),
        };
        self.tasks.spawn(ssh_server::serve(listener, config, Arc::new(pod)));
        Ok(())
    }

    /// ComfyUI listens on the pod's port 8188 from here on. A second call changes nothing.
    pub async fn open_comfy(&self) -> io::Result<()> {
        if let Some(url) = &self.spec.comfyui {
            let (host, port) = network::host_and_port(url)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{url:?} is not an http URL")))?;
            self.network.listen_elsewhere(COMFY_PORT, host, port);
            return Ok(());
        }
        let Some(listener) = self.network.listen(COMFY_PORT) else { return Ok(()) };
        let comfy = Comfy::new(ComfySettings {
            folder: self.spec.folder.join("ComfyUI"),
            volume: self.spec.volume.as_ref().map(|(host_folder, _)| host_folder.clone()),
            gpu_name: self.spec.gpu_name.clone(),
            vram_bytes: u64::from(self.spec.vram_gb) << 30,
            log: self.log.clone(),
            stop: self.stop.clone(),
        });
        self.tasks.spawn(comfy.clone().work());
        self.tasks.spawn(comfy.serve(listener));
        Ok(())
    }

    /// A connection to a port inside the pod, as the HTTP proxy makes it. None: nothing listens there (refused).
    pub async fn connect(&self, port: u16) -> Option<DuplexStream> {
        self.network.connect(port, Via::Proxy).await
    }

    /// What happened in this pod, oldest first: forwards opened, commands run, requests to ComfyUI and how they
    /// arrived (`"via": "direct-tcpip" | "proxy"`), progress values emitted.
    pub fn events(&self) -> Vec<Value> {
        self.log.entries()
    }

    /// Closes every connection, ends every process and frees the port, then removes the folder.
    pub async fn stop(&self) {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(STOP_GRACE, self.tasks.wait()).await.is_err() {
            tracing::error!(pod = self.spec.pod_id, "tasks of a container did not end in time");
        }
        match tokio::fs::remove_dir_all(&self.spec.folder).await {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!(pod = self.spec.pod_id, %error, "the container's folder was not removed"),
        }
    }
}

fn free_port(address: Ipv4Addr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.bind((address, 0).into())?;
    Ok(socket)
}

impl Drop for Container {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
