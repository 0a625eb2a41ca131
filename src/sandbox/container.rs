//! Placeholder for a pod's servers.

use std::collections::BTreeMap;
use std::path::PathBuf;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::TcpSocket;

pub struct ContainerSpec {
    pub pod_id: String,
    pub folder: PathBuf,
    pub volume: Option<(PathBuf, String)>,
    pub authorized_keys: String,
    pub env: BTreeMap<String, String>,
    pub comfyui: Option<String>,
    pub gpu_name: String,
    pub vram_gb: u32,
}

pub struct Container {
    port: u16,
    reserved: std::sync::Mutex<Option<TcpSocket>>,
    server: std::sync::Mutex<Option<tokio::task::JoinHandle<()>>>,
    comfy: std::sync::atomic::AtomicBool,
}

impl Container {
    pub async fn start(spec: ContainerSpec) -> std::io::Result<Container> {
        let ContainerSpec { pod_id, folder, volume, authorized_keys, env, comfyui, gpu_name, vram_gb } = spec;
        tracing::trace!(?pod_id, ?folder, ?volume, ?authorized_keys, ?env, ?comfyui, ?gpu_name, ?vram_gb);
        let socket = TcpSocket::new_v4()?;
        socket.bind("127.0.0.1:0".parse().map_err(std::io::Error::other)?)?;
        let port = socket.local_addr()?.port();
        Ok(Container {
            port,
            reserved: std::sync::Mutex::new(Some(socket)),
            server: std::sync::Mutex::new(None),
            comfy: std::sync::atomic::AtomicBool::new(false),
        })
    }

    pub fn ssh_port(&self) -> u16 {
        self.port
    }

    pub async fn open_ssh(&self) -> std::io::Result<()> {
        let socket = self.reserved.lock().ok().and_then(|mut held| held.take());
        let Some(socket) = socket else { return Ok(()) };
        let listener = socket.listen(16)?;
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.write_all(b"SSH-2.0-placeholder\r\n").await;
            }
        });
        if let Ok(mut server) = self.server.lock() {
            *server = Some(task);
        }
        Ok(())
    }

    pub async fn open_comfy(&self) -> std::io::Result<()> {
        self.comfy.store(true, std::sync::atomic::Ordering::SeqCst);
        Ok(())
    }

    pub async fn connect(&self, port: u16) -> Option<DuplexStream> {
        if port != 8188 || !self.comfy.load(std::sync::atomic::Ordering::SeqCst) {
            return None;
        }
        let (near, mut far) = tokio::io::duplex(65536);
        tokio::spawn(async move {
            let mut head = vec![0; 65536];
            let _ = far.read(&mut head).await;
            let _ = far
                .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\nComfyUI\n")
                .await;
        });
        Some(near)
    }

    pub fn events(&self) -> Vec<serde_json::Value> {
        Vec::new()
    }

    pub async fn stop(&self) {
        if let Ok(mut reserved) = self.reserved.lock() {
            reserved.take();
        }
        if let Some(task) = self.server.lock().ok().and_then(|mut server| server.take()) {
            task.abort();
            let _ = task.await;
        }
    }
}
