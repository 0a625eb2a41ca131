//! Where a pod's own sshd is reached.

use std::net::{IpAddr, Ipv4Addr};

use serde::Deserialize;
use serde_json::Value;

use crate::provider::SshAddress;

const SSH_PORT: u16 = 22;

#[derive(Deserialize)]
pub(super) struct Ssh {
    proxy: Option<Value>,
    direct: Option<SshEndpoint>,
}

#[derive(Deserialize)]
struct SshEndpoint {
    host: Option<String>,
    port: Option<u16>,
    username: Option<String>,
}

#[derive(Deserialize)]
pub(super) struct RuntimePort {
    private: Option<u16>,
    public: Option<u16>,
    r#type: Option<String>,
    ip: Option<String>,
}

/// The address of the pod's sshd, and whether the provider's SSH proxy, which forwards nothing, leads to the pod.
pub(super) fn address(ssh: Option<Ssh>, runtime_ports: &[RuntimePort]) -> (Option<SshAddress>, bool) {
    let has_proxy = ssh.as_ref().is_some_and(|ssh| ssh.proxy.is_some());
    let direct = ssh.and_then(|ssh| ssh.direct).and_then(direct_address);
    (direct.or_else(|| runtime_ports.iter().find_map(mapped_address)), has_proxy)
}

fn direct_address(endpoint: SshEndpoint) -> Option<SshAddress> {
    let user = endpoint.username.filter(|user| !user.is_empty()).unwrap_or_else(|| "root".to_owned());
    let address = SshAddress { host: endpoint.host?, port: endpoint.port?, user };
    if is_safe(&address) {
        return Some(address);
    }
    tracing::debug!(?address, "the provider told an SSH address that is none");
    None
}

/// The mapping of sshd's port, where it leads to an address that can be reached from here. Such a list also holds
/// addresses of the provider's inner network.
fn mapped_address(port: &RuntimePort) -> Option<SshAddress> {
    let is_ssh = port.private == Some(SSH_PORT) && port.r#type.as_deref().is_none_or(|kind| kind == "tcp");
    let host: IpAddr = port.ip.as_deref().filter(|_| is_ssh)?.parse().ok()?;
    let public = port.public.filter(|port| *port != 0)?;
    is_reachable(host).then(|| SshAddress { host: host.to_string(), port: public, user: "root".to_owned() })
}

/// The address becomes arguments of a program: nothing may pass as an option, a list or a path.
fn is_safe(address: &SshAddress) -> bool {
    let plain = |text: &str, more: &str| {
        !text.is_empty()
            && text.len() <= 253
            && !text.starts_with('-')
            && text.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
    };
    address.port != 0 && plain(&address.host, ".-:") && plain(&address.user, "._-")
}

/// Public addresses, and loopback: the provider may be a sandbox on this machine.
fn is_reachable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let shared = v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64;
            let nowhere = v4.octets()[0] == 0 || v4.is_link_local() || v4.is_multicast() || v4 == Ipv4Addr::BROADCAST;
            !(shared || nowhere || v4.is_private())
        }
        IpAddr::V6(v6) => {
            let inner = v6.is_unique_local() || v6.is_unicast_link_local();
            !(inner || v6.is_unspecified() || v6.is_multicast())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The address that a pod's `ssh` and `runtime.ports` lead to.
    fn address_in(ssh: Value, ports: Value) -> (Option<SshAddress>, bool) {
        let ports: Vec<RuntimePort> = serde_json::from_value(ports).unwrap();
        address(serde_json::from_value(ssh).unwrap(), &ports)
    }

    fn root_at(host: &str, port: u16) -> Option<SshAddress> {
        Some(SshAddress { host: host.to_owned(), port, user: "root".to_owned() })
    }

    #[test]
    fn addresses_of_inner_networks_are_no_way_to_a_pod() {
        for inner in
            ["100.64.0.1", "100.127.255.254", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.1.1", "0.0.0.0"]
        {
            assert!(!is_reachable(inner.parse().unwrap()), "{inner}");
        }
        for inner in ["fd00::1", "fe80::1", "::"] {
            assert!(!is_reachable(inner.parse().unwrap()), "{inner}");
        }
        for public in ["100.63.255.255", "100.128.0.1", "203.0.113.9", "127.0.0.1", "2001:db8::1", "::1"] {
            assert!(is_reachable(public.parse().unwrap()), "{public}");
        }
    }

    #[test]
    fn ssh_is_the_direct_endpoint_else_a_public_mapping_and_never_the_proxy() {
        let ports = |ip: &str| {
            json!([
                { "private": 8188, "public": 4000, "type": "http", "ip": "203.0.113.1" },
                { "private": 22, "public": 4001, "type": "tcp", "ip": ip },
            ])
        };
        let proxy = json!({ "host": "ssh.runpod.io", "port": 22, "username": "p-1", "command": "ssh ..." });
        let direct = json!({ "host": "203.0.113.7", "port": 4002, "username": "" });

        let both = json!({ "proxy": proxy, "direct": direct });
        assert_eq!(address_in(both, ports("203.0.113.1")), (root_at("203.0.113.7", 4002), true));
        let neither = json!({ "proxy": null, "direct": null });
        assert_eq!(address_in(neither.clone(), ports("203.0.113.1")), (root_at("203.0.113.1", 4001), false));
        assert_eq!(address_in(neither, json!([{ "private": 22, "public": null, "ip": null }])), (None, false));
        let proxy_only = json!({ "proxy": proxy, "direct": null });
        assert_eq!(address_in(proxy_only, ports("100.65.0.9")), (None, true));
        assert_eq!(address_in(Value::Null, json!([])), (None, false));
    }

    #[test]
    fn an_address_that_would_be_an_option_of_ssh_is_none() {
        for (host, user) in
            [("-oProxyCommand=x", "root"), ("203.0.113.7", "-l"), ("a b", "root"), ("", "root"), ("h", "a@b")]
        {
            let direct = json!({ "host": host, "port": 22, "username": user });
            assert_eq!(address_in(json!({ "direct": direct }), json!([])), (None, false), "{host} {user}");
        }
    }
}
