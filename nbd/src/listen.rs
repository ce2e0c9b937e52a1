//! Where clients connect: unix and TCP listeners, and the socket file's life.

use std::fs::Permissions;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use crate::error::{Error, ErrorKind};
use crate::stats::Peer;

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Listen {
    /// A unix socket. A stale file of an earlier server is replaced, the file is removed at the stop.
    Unix {
        /// Of the socket file; its folder must exist. At most 107 bytes, a limit of the kernel.
        path: PathBuf,
        /// Permissions of the socket file: who may connect. 0600 is usual, since a client has the whole device.
        mode: u32,
    },
    /// A TCP port; port 0 takes a free one. Unprotected: anyone who reaches it has the whole device.
    Tcp(SocketAddr),
    /// Nowhere: connections are only handed in ([`crate::ServerHandle::attach`]).
    Nowhere,
}

/// Where a server can be reached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A TCP port.
    Tcp(SocketAddr),
    /// Only by handed-in connections.
    Nowhere,
}

impl Address {
    /// The NBD URI of the export `name` here; `None` for [`Address::Nowhere`].
    #[must_use]
    pub fn uri(&self, name: &str) -> Option<String> {
        let name = percent_encode(name.as_bytes(), b"");
        match self {
            Self::Unix(path) => {
                let path = percent_encode(path.as_os_str().as_encoded_bytes(), b"/");
                Some(format!("nbd+unix:///{name}?socket={path}"))
            }
            Self::Tcp(address) => Some(format!("nbd://{address}/{name}")),
            Self::Nowhere => None,
        }
    }
}

/// An open listener.
pub(crate) struct Listener {
    pub(crate) address: Address,
    pub(crate) socket: Option<OwnedFd>,
    pub(crate) file: Option<SocketFile>,
}

impl Listener {
    pub(crate) fn open(listen: &Listen) -> Result<Self, Error> {
        match listen {
            Listen::Unix { path, mode } => open_unix(path, *mode),
            Listen::Tcp(address) => {
                let failed = |source: io::Error| {
                    if source.kind() == io::ErrorKind::AddrInUse {
                        return Error::new(ErrorKind::InUse, format!("{address}: the port is in use; choose another"));
                    }
                    Error::system(format!("listen on {address}"), source)
                };
                let socket = bind_tcp(*address).map_err(failed)?;
                let address = Address::Tcp(socket.local_addr().map_err(failed)?);
                Ok(Self { address, socket: Some(socket.into()), file: None })
            }
            Listen::Nowhere => Ok(Self { address: Address::Nowhere, socket: None, file: None }),
        }
    }
}

/// Binds, waiting a little for a killed server's port.
fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    for _ in 1..RELEASE_LOOKS {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => std::thread::park_timeout(RELEASE_LOOK),
            other => return other,
        }
    }
    TcpListener::bind(address)
}

fn open_unix(path: &Path, mode: u32) -> Result<Listener, Error> {
    let failed = |step: &str, source| Error::system(format!("{step} {}", path.display()), source);
    // Clients and the removal at the end need it wherever they stand.
    let path = &std::path::absolute(path).map_err(|source| failed("find", source))?;
    refuse_taken(path)?;
    // Made under another name and moved into place: whoever sees the file finds its permissions set and a listener behind it.
    let temporary = temporary_name(path);
    let _nothing_to_remove = std::fs::remove_file(&temporary);
    let socket = UnixListener::bind(&temporary).map_err(|source| failed("listen on", source))?;
    let prepared = std::fs::set_permissions(&temporary, Permissions::from_mode(mode))
        .and_then(|()| std::fs::symlink_metadata(&temporary))
        .and_then(|metadata| std::fs::rename(&temporary, path).map(|()| metadata));
    let metadata = prepared.map_err(|source| {
        let _best_effort = std::fs::remove_file(&temporary);
        failed("make the socket", source)
    })?;
    let file = SocketFile { path: path.to_owned(), id: (metadata.dev(), metadata.ino()) };
    Ok(Listener { address: Address::Unix(path.to_owned()), socket: Some(socket.into()), file: Some(file) })
}

/// A name in the same folder, unique among living processes, no longer than it must be (the limit is 107 bytes).
fn temporary_name(path: &Path) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    path.with_file_name(format!(".n{:x}-{:x}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// Fails unless the path is free or a stale socket: one behind which nobody listens.
fn refuse_taken(path: &Path) -> Result<(), Error> {
    let metadata = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::system(format!("look at {}", path.display()), source)),
    };
    if !metadata.file_type().is_socket() {
        let why = format!("{} exists and is not a socket; remove it or choose another path", path.display());
        return Err(Error::new(ErrorKind::Invalid, why));
    }
    for _ in 0..RELEASE_LOOKS {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // Only a living listener has a full queue, or permissions that refuse.
            Err(_) => break,
            Ok(stream) if greets(&stream) => break,
            Ok(_) => std::thread::park_timeout(RELEASE_LOOK),
        }
    }
    let why = format!("{}: another server answers there; stop it or choose another path", path.display());
    Err(Error::new(ErrorKind::InUse, why))
}

/// How often and how far apart a listener that says nothing is looked at, 2 s in all. A killed server's socket takes
/// connections until the kernel has torn down its rings: milliseconds, unless the disk hangs.
const RELEASE_LOOKS: u32 = 50;
const RELEASE_LOOK: Duration = Duration::from_millis(20);

/// Whether somebody lives behind a connection: a server speaks first, a dead one's socket is closed or stays silent.
fn greets(mut stream: &UnixStream) -> bool {
    let limited = stream.set_read_timeout(Some(RELEASE_LOOK));
    limited.is_ok() && stream.read(&mut [0; 18]).is_ok_and(|len| len > 0)
}

/// The socket file of a running server; removed on drop if it is still the one that was made.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let same = std::fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.id);
        if same && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "socket file stays");
        }
    }
}

/// Tells who is at the other end, and sets what a served connection needs.
pub(crate) fn prepare(socket: OwnedFd, address: &Address) -> (OwnedFd, Peer) {
    match address {
        Address::Unix(_) => {
            let peer = getsockopt(&socket, sockopt::PeerCredentials)
                .map_or(Peer::Other, |peer| Peer::Unix { pid: peer.pid(), uid: peer.uid() });
            (socket, peer)
        }
        Address::Tcp(_) => {
            let stream = TcpStream::from(socket);
            // Replies are gathered already; a client that vanished without a word is found by keep-alive. A socket that
            // refuses either still works.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "no TCP_NODELAY");
            }
            let _still_works = setsockopt(&stream, sockopt::KeepAlive, &true);
            let peer = stream.peer_addr().map_or(Peer::Other, Peer::Tcp);
            (stream.into(), peer)
        }
        Address::Nowhere => (socket, Peer::Other),
    }
}

fn percent_encode(bytes: &[u8], plain: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || plain.contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_those_of_the_nbd_uri_specification() {
        let unix = Address::Unix(PathBuf::from("/run/far shore/a.sock"));
        assert_eq!(unix.uri("").as_deref(), Some("nbd+unix:///?socket=/run/far%20shore/a.sock"));
        assert_eq!(unix.uri("a/b").as_deref(), Some("nbd+unix:///a%2Fb?socket=/run/far%20shore/a.sock"));
        let tcp = Address::Tcp(SocketAddr::from(([127, 0, 0, 1], 10809)));
        assert_eq!(tcp.uri("disk").as_deref(), Some("nbd://127.0.0.1:10809/disk"));
        assert_eq!(Address::Nowhere.uri(""), None);
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let listen = Listen::Unix { path: folder.path().join("s"), mode: 0o600 };
        let first = Listener::open(&listen).expect("a fresh path");
        let error = Listener::open(&listen).err().expect("the first one answers");
        assert_eq!(error.kind(), ErrorKind::InUse);
        // A server that died: its descriptor is closed, its file stays.
        let Listener { socket, file, .. } = first;
        drop(socket);
        let second = Listener::open(&listen).expect("nobody answers any more");
        let mode = std::fs::metadata(folder.path().join("s")).expect("the socket").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(file);
        assert!(folder.path().join("s").exists(), "the first server's end leaves the second's socket alone");
        drop(second);
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 0, "nothing stays");
    }

    #[test]
    fn a_file_is_never_replaced() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("f");
        std::fs::write(&path, b"precious").expect("writable");
        let error = Listener::open(&Listen::Unix { path: path.clone(), mode: 0o600 }).err().expect("not a socket");
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert_eq!(std::fs::read(&path).expect("still there"), b"precious");
    }
}
