//! Who is connected to a port of this machine. Only Linux tells it without the help of another program.

/// Between two looks. Our own short connections, those of the tunnel's checks, don't last so long.
#[cfg(target_os = "linux")]
const LASTS: std::time::Duration = std::time::Duration::from_millis(100);

/// Whether any process but this one has a connection to this port on 127.0.0.1; `None` where that can't be told. Blocks
/// for a moment where there is one, to see that it stays: one of ours that was closed while we looked seems to be
/// another's.
#[cfg(target_os = "linux")]
pub(super) fn others_are_connected(port: u16) -> Option<bool> {
    let first = others(port)?;
    if first.is_empty() {
        return Some(false);
    }
    std::thread::sleep(LASTS);
    Some(!first.is_disjoint(&others(port)?))
}

/// Where the connections of other processes come from.
#[cfg(target_os = "linux")]
fn others(port: u16) -> Option<std::collections::HashSet<linux::Address>> {
    let before = linux::own_sockets()?;
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    // One that was opened in between is ours too.
    let after = linux::own_sockets()?;
    Some(linux::others_in(&table, port, |socket| before.contains(&socket) || after.contains(&socket)))
}

#[cfg(not(target_os = "linux"))]
pub(super) fn others_are_connected(_port: u16) -> Option<bool> {
    None
}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::HashSet;

    const ESTABLISHED: &str = "01";

    /// Address and port.
    pub(super) type Address = (u32, u16);

    /// A line of the kernel's table: one end of a connection.
    struct End {
        here: Address,
        there: Address,
        socket: u64,
    }

    /// The numbers of the sockets that this process has open.
    pub(super) fn own_sockets() -> Option<HashSet<u64>> {
        let folder = std::fs::read_dir("/proc/self/fd").ok()?;
        let number =
            |link: std::path::PathBuf| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
        Some(folder.flatten().filter_map(|entry| number(std::fs::read_link(entry.path()).ok()?)).collect())
    }

    /// Both ends are in the table: whose connection the listening end holds is told by the other one.
    pub(super) fn others_in(table: &str, port: u16, is_ours: impl Fn(u64) -> bool) -> HashSet<Address> {
        let loopback = (u32::from_ne_bytes([127, 0, 0, 1]), port);
        let ends: Vec<_> = table.lines().filter_map(established).collect();
        let ours: HashSet<_> =
            ends.iter().filter(|end| end.there == loopback && is_ours(end.socket)).map(|end| end.here).collect();
        ends.iter().filter(|end| end.here == loopback && !ours.contains(&end.there)).map(|end| end.there).collect()
    }

    /// `sl local remote state queues timer retransmits uid timeout socket ...`
    fn established(line: &str) -> Option<End> {
        let words: Vec<_> = line.split_whitespace().collect();
        let address = |word: &str| {
            let (address, port) = word.split_once(':')?;
            Some((u32::from_str_radix(address, 16).ok()?, u16::from_str_radix(port, 16).ok()?))
        };
        if *words.get(3)? != ESTABLISHED {
            return None;
        }
        Some(End { here: address(words.get(1)?)?, there: address(words.get(2)?)?, socket: words.get(9)?.parse().ok()? })
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn our_own_connections_are_not_use() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert_eq!(others_are_connected(port), Some(false), "nobody");
        let ours = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (_accepted, _) = listener.accept().unwrap();
        assert_eq!(others_are_connected(port), Some(false), "this process");
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        assert!(!linux::others_in(&table, port, |_| false).is_empty(), "the same, seen by another process");
        drop(ours);
    }

    #[test]
    fn the_connection_of_another_process_is_use_until_it_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let script = format!("exec 3<>/dev/tcp/127.0.0.1/{port}; read -r _");
        let mut other = std::process::Command::new("bash")
            .args(["-c", &script])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .expect("bash");
        let (mut accepted, _) = listener.accept().unwrap();
        assert_eq!(others_are_connected(port), Some(true));
        drop(other.stdin.take());
        other.wait().unwrap();
        assert_eq!(accepted.read(&mut [0]).unwrap(), 0, "its end");
        assert_eq!(others_are_connected(port), Some(false));
    }
}
