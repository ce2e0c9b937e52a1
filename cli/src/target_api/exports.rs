//! Open views: which point, served where. What is needed to serve them again after a restart is kept in the catalog.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_nbd::{Listen, Server, ServerConfig};
use farshore_proto::batch::VolumeDecl;
use farshore_proto::text::show_time;
use farshore_proto::{Name, PointId, VolumeIndex, WallTime};
use farshore_target::catalog::GroupRecord;
use farshore_target::points::Point;
use farshore_target::scratch::Space;
use farshore_target::view::{View, ViewOptions};
use farshore_target::views::{list_views, open_views, remove_views, views_of};
use farshore_uring::DirStorage;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::devices;
use super::service::{Found, Stream, parse_name};
use crate::failure::Failure;

/// Threads that serve one volume.
const SERVER_THREADS: usize = 1;
/// Where a view is served, in the catalog's notes.
const NOTE: &str = "export ";

/// Where a view is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Export {
    /// A socket per volume in this folder.
    Unix(PathBuf),
    /// A TCP port per volume, counting up from this one (or free ones, from 0).
    Tcp(SocketAddr),
    /// A block device of this host per volume.
    Ublk,
}

impl Export {
    /// From `nbd+unix:DIR`, `nbd+tcp:ADDR` or `ublk`.
    pub(super) fn parse(text: &str) -> Result<Self, Failure> {
        if text == "ublk" {
            return Ok(Self::Ublk);
        }
        if let Some(dir) = text.strip_prefix("nbd+unix:") {
            let dir = PathBuf::from(dir);
            if dir.is_absolute() {
                return Ok(Self::Unix(dir));
            }
        } else if let Some(address) = text.strip_prefix("nbd+tcp:")
            && let Ok(address) = address.parse()
        {
            return Ok(Self::Tcp(address));
        }
        Err(Failure::usage(format!("export {text:?}"), "is none of nbd+unix:DIR (absolute), nbd+tcp:IP:PORT and ublk"))
    }
}

/// What serves one volume of a view.
enum Served {
    Nbd(farshore_nbd::ServerHandle),
    Ublk(Box<devices::Device>),
}

impl Served {
    /// What a guest opens.
    fn address(&self) -> Option<String> {
        match self {
            Self::Nbd(server) => server.uri(),
            Self::Ublk(device) => Some(device.path().display().to_string()),
        }
    }

    /// Keeps others from beginning to use it, until what is returned is dropped. Clients of NBD are not asked.
    fn hold(&self) -> Result<Option<File>, Failure> {
        match self {
            Self::Nbd(_) => Ok(None),
            Self::Ublk(device) => device.hold(),
        }
    }

    /// Ends it, whoever uses it. A second time does nothing.
    fn stop(&self) -> Result<(), String> {
        match self {
            Self::Nbd(server) => server.stop().map_err(|error| error.to_string()),
            Self::Ublk(device) => device.stop().map_err(|error| farshore_agent::chain(&error)),
        }
    }
}

struct Volume {
    decl: VolumeDecl,
    view: View<DirStorage>,
    server: Served,
}

struct Open {
    stream: Arc<Stream>,
    point: PointId,
    time: WallTime,
    read_only: bool,
    volumes: Vec<Volume>,
}

/// The open views of a target.
pub(super) struct Exports {
    sockets: PathBuf,
    /// How much disk each view's volume may take.
    space: Space,
    open: BTreeMap<String, Open>,
}

impl Exports {
    /// Block devices that views of a crashed target had are removed.
    pub(super) fn new(sockets: PathBuf, space: Space) -> Self {
        devices::clean(&sockets);
        Self { sockets, space, open: BTreeMap::new() }
    }

    /// Opens a view of `found`; `catalog` has the views of all groups. The point is held from before the first read until
    /// the view is closed.
    pub(super) fn open(
        &mut self,
        found: &Found,
        catalog: &BTreeMap<Name, GroupRecord>,
        export: Option<Export>,
        read_only: bool,
    ) -> Result<Value, Failure> {
        let noted = noted_ids(catalog);
        let is_free = |id: &String| !self.open.contains_key(id) && !noted.contains(id);
        let id = (1..).map(|number| format!("v{number}")).find(is_free).unwrap_or_default();
        let export = export.unwrap_or_else(|| Export::Unix(self.sockets.clone()));
        match self.serve(&found.stream, &id, &found.point, &export, read_only) {
            Ok(()) => Ok(self.open[&id].document(&id)),
            Err(failure) => {
                // Best effort: what was opened of it goes again, the failure is what counts. The id was nobody's before.
                let _ = forget(&found.stream, &id);
                Err(failure)
            }
        }
    }

    /// Serves a stream's views again that were open when the target stopped.
    pub(super) fn reopen(&mut self, stream: &Arc<Stream>) {
        for (key, text) in stream.record().notes {
            let Some(id) = key.strip_prefix(NOTE) else { continue };
            if let Err(failure) = self.reopen_one(stream, id, &text) {
                tracing::error!(view = id, %failure, "a view cannot be served again; its writes are kept");
            }
        }
    }

    fn reopen_one(&mut self, stream: &Arc<Stream>, id: &str, text: &str) -> Result<(), Failure> {
        let export: Export = serde_json::from_str(text).map_err(|error| Failure::failed("view", error.to_string()))?;
        let Some(view) = list_views(stream).into_iter().find(|view| view.id.as_str() == id) else {
            // It was being opened, or closed, when the target ended.
            return forget(stream, id);
        };
        let point = stream.check_point(&view.of.point)?;
        self.serve(stream, id, &point, &export, view.read_only)
    }

    /// Opens and serves each volume of the point.
    fn serve(
        &mut self,
        stream: &Arc<Stream>,
        id: &str,
        point: &Point,
        export: &Export,
        read_only: bool,
    ) -> Result<(), Failure> {
        let name = parse_name("view", id)?;
        let mut decls = stream.record().volumes;
        decls.retain(|decl| point.volumes.contains(&decl.index));
        if decls.is_empty() {
            return Err(Failure::failed(format!("point {}", point.id), "includes no volume"));
        }
        let text = serde_json::to_string(export).map_err(|error| Failure::failed("view", error.to_string()))?;
        let options = ViewOptions { read_only, space: self.space, ..ViewOptions::default() };
        let indexes: Vec<VolumeIndex> = decls.iter().map(|decl| decl.index).collect();
        let note = format!("{NOTE}{id}");
        let views = open_views(stream, &name, point.id, &indexes, options, Some((&note, &text)))?;
        let mut volumes = Vec::new();
        for (decl, view) in decls.into_iter().zip(views) {
            let server = start_server(id, &decl, point.id, export, volumes.len(), &view, &self.sockets)?;
            volumes.push(Volume { decl, view, server });
        }
        let open = Open { stream: Arc::clone(stream), point: point.id, time: point.time, read_only, volumes };
        self.open.insert(id.to_owned(), open);
        Ok(())
    }

    /// Ends a view and drops what was written to it.
    pub(super) fn close(&mut self, id: &str) -> Result<Value, Failure> {
        let open = self.open.get(id).ok_or_else(|| {
            Failure::not_found(format!("view {id}"), "no such view is open").hint("`farshore view list` lists them")
        })?;
        // First all of them: a view with one device in use stays as it is.
        let held = open.volumes.iter().map(|volume| volume.server.hold()).collect::<Result<Vec<_>, _>>()?;
        for volume in &open.volumes {
            volume.server.stop().map_err(|error| Failure::failed(format!("view {id}"), error))?;
        }
        drop(held);
        let open = self.open.remove(id).expect("it was there a moment ago, and `self` is ours");
        let stream = Arc::clone(&open.stream);
        drop(open);
        forget(&stream, id)?;
        Ok(json!({ "id": id }))
    }

    pub(super) fn list(&self) -> Value {
        json!(self.open.iter().map(|(id, open)| open.document(id)).collect::<Vec<_>>())
    }

    /// Stops serving; what was written is durable and the views come back at the next start.
    pub(super) fn stop(&mut self) {
        for (id, open) in std::mem::take(&mut self.open) {
            for volume in &open.volumes {
                if volume.server.hold().is_err() {
                    tracing::warn!(
                        view = id,
                        device = volume.server.address(),
                        "a view's device is in use, and goes away"
                    );
                }
                if let Err(error) = volume.server.stop() {
                    tracing::error!(view = id, error, "a view did not stop in order");
                }
                if !open.read_only
                    && let Err(error) = volume.view.flush()
                {
                    tracing::error!(view = id, %error, "the last writes to a view may be lost");
                }
            }
        }
    }
}

/// Ids of the views in the catalog. One that cannot be served again keeps its id, and with it what was written to it.
fn noted_ids(catalog: &BTreeMap<Name, GroupRecord>) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    for record in catalog.values().flat_map(|group| group.hosts.values()) {
        ids.extend(record.notes.keys().filter_map(|key| key.strip_prefix(NOTE)).map(str::to_owned));
        ids.extend(views_of(record).into_iter().map(|view| view.id.to_string()));
    }
    ids
}

/// Removes a view's volumes with what was written to them, and the note.
fn forget(stream: &Arc<Stream>, id: &str) -> Result<(), Failure> {
    Ok(remove_views(stream, &parse_name("view", id)?, &format!("{NOTE}{id}"))?)
}

impl Open {
    fn document(&self, id: &str) -> Value {
        let volume = |volume: &Volume| {
            json!({
                "volume": volume.decl.name.to_string(),
                "device": volume.server.address(),
                "size_bytes": volume.decl.size,
            })
        };
        json!({
            "id": id,
            "group": self.stream.id.group_name.to_string(),
            "point": self.point.to_string(),
            "time": show_time(self.time),
            "read_only": self.read_only,
            "volumes": self.volumes.iter().map(volume).collect::<Vec<_>>(),
        })
    }
}

fn start_server(
    id: &str,
    decl: &VolumeDecl,
    point: PointId,
    export: &Export,
    place: usize,
    view: &View<DirStorage>,
    sockets: &Path,
) -> Result<Served, Failure> {
    let listen = match export {
        Export::Unix(dir) => {
            make_folder(dir)?;
            Listen::Unix { path: socket_path(dir, id, decl), mode: 0o600 }
        }
        Export::Tcp(address) => {
            let mut address = *address;
            if address.port() != 0 {
                let port = u16::try_from(usize::from(address.port()) + place);
                address.set_port(port.map_err(|_| Failure::usage("export", "runs out of ports"))?);
            }
            Listen::Tcp(address)
        }
        Export::Ublk => {
            make_folder(sockets)?;
            return devices::start(id, &sockets.join(format!("{id}-{}.ublk", decl.name)), view)
                .map(|device| Served::Ublk(Box::new(device)));
        }
    };
    let mut config = ServerConfig::new("", listen);
    config.description = format!("{} at {point}", decl.name);
    config.threads = SERVER_THREADS;
    Server::start(config, Arc::new(view.clone()))
        .map(Served::Nbd)
        .map_err(|error| Failure::failed(format!("view {id}"), error.to_string()))
}

fn make_folder(dir: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(dir)
        .map_err(|error| Failure::failed(format!("folder {}", dir.display()), error.to_string()))
}

fn socket_path(dir: &Path, id: &str, decl: &VolumeDecl) -> PathBuf {
    dir.join(format!("{id}-{}.sock", decl.name))
}

#[cfg(test)]
mod tests {
    use farshore_target::catalog::HostRecord;

    use super::*;

    /// Goal: no id of a view that the catalog knows is given again, whether its export, its volumes or both are noted.
    #[test]
    fn noted_ids_are_taken() {
        let name = |text: &str| Name::new(text).expect("a name");
        let group = |notes: &[(&str, &str)]| {
            let notes = notes.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
            let hosts = [(name("host"), HostRecord { notes, ..HostRecord::default() })].into();
            GroupRecord { hosts, ..GroupRecord::default() }
        };
        let first = group(&[("export v1", "\"Ublk\""), ("view v1 0", "g1-i1-b3 1048576 512 1 rw"), ("base v9", "x")]);
        let second = group(&[("export v2", "unreadable"), ("view v3 1", "g1-i1-b4 1048576 512 2 ro")]);
        let catalog = [(name("a"), first), (name("b"), second)].into();
        assert_eq!(noted_ids(&catalog), ["v1", "v2", "v3"].map(str::to_owned).into());
    }
}
