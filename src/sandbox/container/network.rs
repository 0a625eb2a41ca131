//! The network inside a pod: which ports have a listener, and connections to them that never touch the host's
//! network.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, DuplexStream, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

/// What a connection inside the pod may hold unread in one direction. Large, for downloads.
const STREAM_BUFFER: usize = 256 * 1024;
/// How much is copied at once between two streams.
const COPY_BUFFER: usize = 64 * 1024;
/// Connections that a listener has not accepted yet.
const BACKLOG: usize = 128;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How a connection got into the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// Through an SSH forward.
    DirectTcpip,
    /// Through the provider's HTTP proxy.
    Proxy,
}

impl Via {
    pub fn name(self) -> &'static str {
        match self {
            Via::DirectTcpip => "direct-tcpip",
            Via::Proxy => "proxy",
        }
    }
}

/// The ports of one pod. Cheap to clone.
#[derive(Clone)]
pub struct Network {
    listeners: Arc<Mutex<HashMap<u16, Listening>>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Clone)]
enum Listening {
    Inside(mpsc::Sender<(DuplexStream, Via)>),
    Elsewhere { host: String, port: u16 },
}

impl Network {
    pub fn new(stop: CancellationToken, tasks: TaskTracker) -> Network {
        Network { listeners: Arc::default(), stop, tasks }
    }

    /// Takes a port for a server inside the pod. None: the port is taken.
    pub fn listen(&self, port: u16) -> Option<PodListener> {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        if listeners.contains_key(&port) {
            return None;
        }
        let (sender, arrivals) = mpsc::channel(BACKLOG);
        listeners.insert(port, Listening::Inside(sender));
        Some(PodListener { arrivals, stop: self.stop.clone() })
    }

    /// Lets a port lead to a server outside of the sandbox.
    pub fn listen_elsewhere(&self, port: u16, host: String, outer_port: u16) {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        listeners.insert(port, Listening::Elsewhere { host, port: outer_port });
    }

    /// Connects to a port of the pod. None: nothing listens there.
    pub async fn connect(&self, port: u16, via: Via) -> Option<DuplexStream> {
        if self.stop.is_cancelled() {
            return None;
        }
        let listening = self.listeners.lock().unwrap_or_else(PoisonError::into_inner).get(&port).cloned()?;
        let (ours, theirs) = tokio::io::duplex(STREAM_BUFFER);
        match listening {
            Listening::Inside(sender) => sender.send((theirs, via)).await.ok()?,
            Listening::Elsewhere { host, port } => {
                let connecting = TcpStream::connect((host.as_str(), port));
                let outer = tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.ok()?.ok()?;
                // Failing leaves small packets waiting a little; nothing breaks.
                let _ = outer.set_nodelay(true);
                let stop = self.stop.clone();
                self.tasks.spawn(async move { stop.run_until_cancelled(join(theirs, outer)).await });
            }
        }
        Some(ours)
    }
}

/// The listening side of a port inside the pod.
pub struct PodListener {
    arrivals: mpsc::Receiver<(DuplexStream, Via)>,
    stop: CancellationToken,
}

impl axum::serve::Listener for PodListener {
    type Io = Severable<DuplexStream>;
    type Addr = Via;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.arrivals.recv().await {
            Some((stream, via)) => (Severable::new(stream, self.stop.clone()), via),
            // Nobody can connect any more. The server is ended by its own signal, not by this.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(Via::Proxy)
    }
}

/// Copies both ways until the `far` side has said all and the `near` side heard it. A side that stops listening early
/// (a server that answers before it has read the whole request) does not cut off what it still has to say.
pub async fn join<Near, Far>(near: Near, far: Far)
where
    Near: AsyncRead + AsyncWrite,
    Far: AsyncRead + AsyncWrite,
{
    let (near_read, mut near_write) = tokio::io::split(near);
    let (far_read, mut far_write) = tokio::io::split(far);
    let forth = async {
        let mut near_read = BufReader::with_capacity(COPY_BUFFER, near_read);
        if copy_and_shut(&mut near_read, &mut far_write).await.is_err() {
            // The far side no longer reads. What still comes is thrown away, so that the near side can go on to
            // where it reads the answer.
            let _ = tokio::io::copy_buf(&mut near_read, &mut tokio::io::sink()).await;
            let _ = far_write.shutdown().await;
        }
    };
    let back = async {
        let mut far_read = BufReader::with_capacity(COPY_BUFFER, far_read);
        copy_and_shut(&mut far_read, &mut near_write).await
    };
    tokio::pin!(forth);
    tokio::pin!(back);
    let mut forth_done = false;
    loop {
        tokio::select! {
            // When the near side no longer listens, there is nobody left to carry anything for.
            result = &mut back => {
                if result.is_ok() && !forth_done {
                    forth.await;
                }
                return;
            }
            () = &mut forth, if !forth_done => forth_done = true,
        }
    }
}

async fn copy_and_shut<R, W>(reader: &mut R, writer: &mut W) -> io::Result<()>
where
    R: tokio::io::AsyncBufRead + Unpin,
    W: AsyncWrite + Unpin,
{
    tokio::io::copy_buf(reader, writer).await?;
    writer.shutdown().await
}

/// A stream that ends, for whoever holds it, when the pod stops.
pub struct Severable<S> {
    stream: S,
    stopped: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<S> Severable<S> {
    pub fn new(stream: S, stop: CancellationToken) -> Severable<S> {
        Severable { stream, stopped: Box::pin(stop.cancelled_owned()) }
    }

    fn poll_stopped(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.stopped.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the pod stopped")),
            Poll::Pending => Ok(()),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Severable<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_stopped(cx)?;
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Severable<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_stopped(cx)?;
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// The host and port that a plain http URL leads to.
pub fn host_and_port(url: &str) -> Option<(String, u16)> {
    let uri: axum::http::Uri = url.parse().ok()?;
    if uri.scheme_str() != Some("http") {
        return None;
    }
    Some((uri.host()?.trim_matches(['[', ']']).to_owned(), uri.port_u16().unwrap_or(80)))
}
