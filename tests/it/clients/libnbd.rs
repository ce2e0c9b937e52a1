//! libnbd's tools as clients.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{text, view_equals_source};
use crate::support::rig::{GROUP, VOLUME};
use crate::support::{MIB, Rig, device, pattern};
use farshore_cli::sites::run::{call, find};

fn nbdinfo(uri: &str) -> Result<Value> {
    let out = call(find("nbdinfo", "libnbd-bin")?, ["--json", uri])?;
    let document: Value = serde_json::from_str(&out).context("nbdinfo prints JSON")?;
    Ok(document["exports"][0].clone())
}

#[test]
fn nbdcopy_copies_in_and_out() {
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (image, socket, _) = rig.protect(32 * MIB, 1)?;
            let nbdcopy = find("nbdcopy", "libnbd-bin")?;
            let (source, out) = (rig.dir().join("in.raw"), rig.dir().join("out.raw"));
            let wanted = pattern::image(&source, 32 * MIB, 2)?;
            // While the initial sync still runs, over several connections.
            let uri = device::uri(&socket);
            call(&nbdcopy, ["--flush", "--connections=4", "--destination-is-zero", text(&source)?, &uri])
                .map(drop)
                .or_else(|_| call(&nbdcopy, ["--flush", "--connections=4", text(&source)?, &uri]).map(drop))?;
            call(&nbdcopy, ["--flush", text(&source)?, &uri])?;
            call(&nbdcopy, ["--connections=4", &uri, text(&out)?])?;
            device::same("copied out of the volume", &device::read_file(&out)?, &wanted)?;
            view_equals_source(rig, &image)?;
            let view = rig.sites.open_view(GROUP, "latest", true)?;
            std::fs::remove_file(&out)?;
            call(&nbdcopy, [&device::uri(&device::view_socket(&view, VOLUME)?), text(&out)?])?;
            device::same("copied out of the view", &device::read_file(&out)?, &wanted)?;
            rig.sites.close_view(&view)
        },
    );
}

#[test]
fn nbdinfo_sees_what_the_volume_and_its_views_can_do() {
    Rig::test(
        |_| {},
        |rig| {
            let (_, socket, _) = rig.protect(8 * MIB, 1)?;
            rig.wait()?;
            let volume = nbdinfo(&device::uri(&socket))?;
            for (key, wanted) in [
                ("is_read_only", false),
                ("can_flush", true),
                ("can_fua", true),
                ("can_trim", true),
                ("can_zero", true),
                ("can_multi_conn", true),
            ] {
                ensure!(volume[key] == wanted, "{key}: {volume}");
            }
            ensure!(volume["export-size"] == 8 * MIB, "{volume}");
            let minimum = volume["block_minimum"].as_u64().or_else(|| volume["block_size_minimum"].as_u64());
            ensure!(minimum.is_some_and(|block| block.is_power_of_two() && block <= 4096), "{volume}");

            let view = rig.sites.open_view(GROUP, "latest", true)?;
            let shown = nbdinfo(&device::uri(&device::view_socket(&view, VOLUME)?))?;
            ensure!(shown["is_read_only"] == true && shown["export-size"] == 8 * MIB, "{shown}");
            rig.sites.close_view(&view)?;
            let view = rig.sites.open_view(GROUP, "latest", false)?;
            let shown = nbdinfo(&device::uri(&device::view_socket(&view, VOLUME)?))?;
            ensure!(shown["is_read_only"] == false && shown["can_flush"] == true, "{shown}");
            rig.sites.close_view(&view)
        },
    );
}
