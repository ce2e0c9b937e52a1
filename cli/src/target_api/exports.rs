//! Open views: which point, served where. What is needed to serve them again after a restart is kept in the catalog.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use farshore_nbd::{Listen, Server, ServerConfig, ServerHandle};
use farshore_proto::batch::VolumeDecl;
use farshore_proto::text::show_time;
use farshore_proto::{PointId, VolumeIndex, WallTime};
use farshore_target::points::Point;
use farshore_target::scratch::Space;
use farshore_target::view::{View, ViewOptions};
use farshore_target::views::{list_views, open_views, remove_views};
use farshore_uring::DirStorage;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

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
}

impl Export {
    /// From `nbd+unix:DIR` or `nbd+tcp:ADDR`.
    pub(super) fn parse(text: &str) -> Result<Self, Failure> {
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
        Err(Failure::usage(format!("export {text:?}"), "is neither nbd+unix:DIR (absolute) nor nbd+tcp:IP:PORT"))
    }
}

struct Volume {
    decl: VolumeDecl,
    view: View<DirStorage>,
    server: ServerHandle,
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
    pub(super) fn new(sockets: PathBuf, space: Space) -> Self {
        Self { sockets, space, open: BTreeMap::new() }
    }

    /// Opens a view of `found`. The point is held from before the first read until the view is closed.
    pub(super) fn open(&mut self, found: &Found, export: Option<Export>, read_only: bool) -> Result<Value, Failure> {
        let id = (1..).map(|number| format!("v{number}")).find(|id| !self.open.contains_key(id)).unwrap_or_default();
        let export = export.unwrap_or_else(|| Export::Unix(self.sockets.clone()));
        match self.serve(&found.stream, &id, &found.point, &export, read_only) {
            Ok(()) => Ok(self.open[&id].document(&id)),
            Err(failure) => {
                // Best effort: what was opened of it goes again, the failure is what counts.
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
            let server = start_server(id, &decl, point.id, export, volumes.len(), &view)?;
            volumes.push(Volume { decl, view, server });
        }
        let open = Open { stream: Arc::clone(stream), point: point.id, time: point.time, read_only, volumes };
        self.open.insert(id.to_owned(), open);
        Ok(())
    }

    /// Ends a view and drops what was written to it.
    pub(super) fn close(&mut self, id: &str) -> Result<Value, Failure> {
        let open = self.open.remove(id).ok_or_else(|| {
            Failure::not_found(format!("view {id}"), "no such view is open").hint("`farshore view list` lists them")
        })?;
        for volume in &open.volumes {
            volume.server.stop().map_err(|error| Failure::failed(format!("view {id}"), error.to_string()))?;
        }
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
                if let Err(error) = volume.server.stop() {
                    tracing::error!(view = id, %error, "a view did not stop in order");
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

/// Removes a view's volumes with what was written to them, and the note.
fn forget(stream: &Arc<Stream>, id: &str) -> Result<(), Failure> {
    Ok(remove_views(stream, &parse_name("view", id)?, &format!("{NOTE}{id}"))?)
}

impl Open {
    fn document(&self, id: &str) -> Value {
        let volume = |volume: &Volume| {
            json!({
                "volume": volume.decl.name.to_string(),
                "device": volume.server.uri(),
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
) -> Result<ServerHandle, Failure> {
    let listen = match export {
        Export::Unix(dir) => {
            std::fs::create_dir_all(dir)
                .map_err(|error| Failure::failed(format!("folder {}", dir.display()), error.to_string()))?;
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
    };
    let mut config = ServerConfig::new("", listen);
    config.description = format!("{} at {point}", decl.name);
    config.threads = SERVER_THREADS;
    Server::start(config, Arc::new(view.clone()))
        .map_err(|error| Failure::failed(format!("view {id}"), error.to_string()))
}

fn socket_path(dir: &Path, id: &str, decl: &VolumeDecl) -> PathBuf {
    dir.join(format!("{id}-{}.sock", decl.name))
}
