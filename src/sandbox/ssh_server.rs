//! The SSH server of one pod: public keys only, commands in a real shell, forwards to the pod's own ports.
//!
//! What a plain sshd of a GPU image would do for tunnels and copies is done for real; what nobody needs here
//! (terminals, agents, X11, remote forwards) is refused.
//!
//! One limit comes from russh: a channel whose receiver does not read holds up its whole connection once its buffer
//! of [`CHANNEL_MESSAGES`] messages is full. A command that never reads a large stdin shows it.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use russh::keys::{Algorithm, PrivateKey, PublicKey};
use russh::server::{Auth, ChannelOpenHandle, Config, Handler, Msg, PublicKeyOffer, Session, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, MethodKind, MethodSet, SshId};
use serde_json::json;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::container::isolation::Isolation;
use super::container::log::EventLog;
use super::container::network::{self, Network, Severable, Via};

mod command;

/// The only user of a pod.
const USER: &str = "root";
/// How much a client may send on a channel before it must wait for us, in bytes.
const WINDOW: u32 = 4 * 1024 * 1024;
/// The most that the protocol's implementation takes in one packet.
const LARGEST_PACKET: u32 = 65_535;
/// Messages of one channel kept for a receiver that is slower than the network.
const CHANNEL_MESSAGES: usize = 256;
/// A wrong key is refused after this long: enough to be no oracle, short enough for tests.
const REFUSAL_DELAY: Duration = Duration::from_millis(50);
/// How long a client may take to introduce itself.
const GREETING_TIMEOUT: Duration = Duration::from_secs(30);
/// Where systems have OpenSSH's SFTP server; all are lent to the pods.
const SFTP_SERVERS: &[&str] = &[
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/lib/ssh/sftp-server",
    "/usr/libexec/sftp-server",
];

/// What the server needs to know of its pod.
pub struct Pod {
    pub isolation: Isolation,
    pub authorized_keys: Vec<PublicKey>,
    pub network: Network,
    pub log: EventLog,
    pub stop: CancellationToken,
    pub tasks: TaskTracker,
}

/// A configuration with a fresh host key.
pub fn config() -> Result<Arc<Config>, russh::keys::ssh_key::Error> {
    let host_key = PrivateKey::random(&mut russh::keys::key::safe_rng(), Algorithm::Ed25519)?;
    Ok(Arc::new(Config {
        server_id: SshId::Standard("SSH-2.0-autopod_sandbox".into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        auth_rejection_time: REFUSAL_DELAY,
        // OpenSSH first asks without any key, only to learn the methods.
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![host_key],
        window_size: WINDOW,
        maximum_packet_size: LARGEST_PACKET,
        channel_buffer_size: CHANNEL_MESSAGES,
        // A tunnel at rest is not garbage.
        inactivity_timeout: None,
        nodelay: true,
        ..Config::default()
    }))
}

/// The keys of an `authorized_keys` text. Lines that are no key are left out, with a warning, as sshd does.
pub fn parse_authorized_keys(text: &str) -> Vec<PublicKey> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .filter_map(|line| match PublicKey::from_openssh(line) {
            Ok(key) => Some(key),
            Err(error) => {
                tracing::warn!(%error, "a line of PUBLIC_KEY is not a public key");
                None
            }
        })
        .collect()
}

/// Answers on `listener` until the pod stops.
pub async fn serve(listener: TcpListener, config: Arc<Config>, pod: Arc<Pod>) {
    let stop = pod.stop.clone();
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    pod.tasks.spawn(serve_connection(stream, config.clone(), pod.clone()));
                }
                Err(error) => {
                    // Out of file handles, most likely: turning in a circle would not free any.
                    tracing::warn!(%error, "an SSH connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    stop.run_until_cancelled(accepting).await;
}

async fn serve_connection(stream: TcpStream, config: Arc<Config>, pod: Arc<Pod>) {
    // Failing leaves small packets waiting a little; nothing breaks.
    let _ = stream.set_nodelay(config.nodelay);
    let stream = Severable::new(stream, pod.stop.clone());
    let connection = Connection { pod, sessions: HashMap::new(), forwards: CancellationToken::new().drop_guard() };
    let greeting = russh::server::run_stream(config, stream, connection);
    match tokio::time::timeout(GREETING_TIMEOUT, greeting).await {
        Ok(Ok(session)) => {
            if let Err(error) = session.await {
                tracing::debug!(%error, "an SSH connection ended");
            }
        }
        Ok(Err(error)) => tracing::debug!(%error, "an SSH connection did not begin"),
        Err(_) => tracing::debug!("an SSH client did not introduce itself"),
    }
}

/// One client's connection.
struct Connection {
    pod: Arc<Pod>,
    sessions: HashMap<ChannelId, SessionChannel>,
    /// Ends the forwards of this connection when it is dropped.
    forwards: DropGuard,
}

enum SessionChannel {
    /// Opened; what it is for has not been asked yet.
    Fresh(Channel<Msg>),
    /// A command runs; dropping the guard ends it.
    Running { _ends_the_command: DropGuard },
}

impl Connection {
    fn authorize(&self, user: &str, key: &PublicKey) -> Auth {
        let known = self.pod.authorized_keys.iter().any(|authorized| authorized.key_data() == key.key_data());
        if user == USER && known { Auth::Accept } else { Auth::reject() }
    }

    fn run(&mut self, id: ChannelId, command: &[u8], session: &mut Session) -> Result<(), russh::Error> {
        let Some(SessionChannel::Fresh(channel)) = self.sessions.remove(&id) else {
            return session.channel_failure(id);
        };
        let ended = self.pod.stop.child_token();
        self.sessions.insert(id, SessionChannel::Running { _ends_the_command: ended.clone().drop_guard() });
        session.channel_success(id)?;
        let run = command::Run {
            command: command.to_vec(),
            isolation: self.pod.isolation.clone(),
            handle: session.handle(),
            ended,
            log: self.pod.log.clone(),
        };
        self.pod.tasks.spawn(run.carry_out(channel));
        Ok(())
    }
}

impl Handler for Connection {
    type Error = russh::Error;

    async fn auth_publickey_offered(&mut self, user: &str, offer: PublicKeyOffer<'_>) -> Result<Auth, Self::Error> {
        Ok(self.authorize(user, offer.public_key))
    }

    async fn auth_publickey(&mut self, user: &str, key: VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(self.authorize(user, key.public_key))
    }

    async fn auth_succeeded(&mut self, _session: &mut Session) -> Result<(), Self::Error> {
        self.pod.log.add("ssh_login", json!({ "user": USER }));
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        self.sessions.insert(channel.id(), SessionChannel::Fresh(channel));
        reply.accept().await;
        Ok(())
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        host: &str,
        port: u32,
        _originator_address: &str,
        _originator_port: u32,
        reply: ChannelOpenHandle,
        _session: &mut Session,
    ) -> Result<(), Self::Error> {
        let pod = self.pod.clone();
        let host = host.to_owned();
        let ended = CancellationToken::clone(self.forwards.token());
        self.pod.tasks.spawn(async move {
            let work = forward(&pod, channel, &host, port, reply);
            tokio::select! {
                () = work => {}
                () = ended.cancelled() => {}
                () = pod.stop.cancelled() => {}
            }
        });
        Ok(())
    }

    async fn exec_request(&mut self, id: ChannelId, command: &[u8], session: &mut Session) -> Result<(), Self::Error> {
        self.run(id, command, session)
    }

    async fn shell_request(&mut self, id: ChannelId, session: &mut Session) -> Result<(), Self::Error> {
        session.channel_success(id)?;
        session.extended_data(id, 1, "This sandbox pod runs commands, not login shells: ssh ... 'command'\r\n")?;
        session.eof(id)?;
        session.exit_status_request(id, 1)?;
        session.close(id)
    }

    async fn pty_request(
        &mut self,
        id: ChannelId,
        _term: &str,
        _columns: u32,
        _rows: u32,
        _width: u32,
        _height: u32,
        _modes: &[(russh::Pty, u32)],
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn x11_request(
        &mut self,
        id: ChannelId,
        _single_connection: bool,
        _protocol: &str,
        _cookie: &str,
        _screen: u32,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn env_request(
        &mut self,
        id: ChannelId,
        _name: &str,
        _value: &str,
        session: &mut Session,
    ) -> Result<(), Self::Error> {
        session.channel_failure(id)
    }

    async fn subsystem_request(&mut self, id: ChannelId, name: &str, session: &mut Session) -> Result<(), Self::Error> {
        let server = SFTP_SERVERS.iter().find(|path| name == "sftp" && Path::new(path).exists());
        match server {
            Some(server) if self.pod.isolation.ready().await.is_ok() => {
                self.run(id, format!("exec {server}").as_bytes(), session)
            }
            _ => session.channel_failure(id),
        }
    }

    async fn agent_request(&mut self, id: ChannelId, session: &mut Session) -> Result<bool, Self::Error> {
        session.channel_failure(id)?;
        Ok(false)
    }

    async fn channel_close(&mut self, id: ChannelId, _session: &mut Session) -> Result<(), Self::Error> {
        self.sessions.remove(&id);
        Ok(())
    }
}

/// Serves one direct-tcpip channel. Like a real sshd it is "connection refused" where nothing listens.
async fn forward(pod: &Pod, channel: Channel<Msg>, host: &str, port: u32, reply: ChannelOpenHandle) {
    let stream = match u16::try_from(port) {
        Ok(port) if is_this_pod(host) => pod.network.connect(port, Via::DirectTcpip).await,
        _ => None,
    };
    pod.log.add(
        "forward",
        json!({ "via": Via::DirectTcpip.name(), "host": host, "port": port, "accepted": stream.is_some() }),
    );
    match stream {
        Some(stream) => {
            reply.accept().await;
            network::join(channel.into_stream(), stream).await;
        }
        None => reply.reject(ChannelOpenFailure::ConnectFailed).await,
    }
}

fn is_this_pod(host: &str) -> bool {
    matches!(host, "127.0.0.1" | "localhost" | "::1")
}
