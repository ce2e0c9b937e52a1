//! QEMU's tools as clients: images in and out, FUA, write zeroes and discard.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::{text, view_equals_source};
use crate::support::rig::{GROUP, VOLUME};
use crate::support::{LIMIT_SECONDS, MIB, Rig, device, pattern};
use farshore_cli::sites::run::{call, find};

fn qemu_img(args: &[&str]) -> Result<String> {
    call(find("qemu-img", "qemu-utils")?, args.iter().copied())
}

/// Runs qemu-io commands in one session; an error if any says that a pattern does not match.
fn qemu_io(uri: &str, commands: &[&str]) -> Result<String> {
    session(&["-f", "raw", "-t", "writeback"], uri, commands)
}

/// As [`qemu_io`], on an export that takes no writes.
fn qemu_io_read_only(uri: &str, commands: &[&str]) -> Result<String> {
    session(&["-f", "raw", "-r"], uri, commands)
}

fn session(options: &[&str], uri: &str, commands: &[&str]) -> Result<String> {
    let mut args = options.to_vec();
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(uri);
    let out = call(find("qemu-io", "qemu-utils")?, args)?;
    ensure!(!out.contains("failed"), "qemu-io: {out}");
    Ok(out)
}

/// Goal: an image converted into a protected volume is the same image when it is converted out of a view. Method: a qcow2
/// with data and holes goes in over what the volume held before.
#[test]
fn images_convert_in_and_out() {
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (image, socket, _) = rig.protect(32 * MIB, 1)?;
            rig.wait()?;
            let (raw, qcow2) = (rig.dir().join("in.raw"), rig.dir().join("in.qcow2"));
            let wanted = pattern::image(&raw, 32 * MIB, 2)?;
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw)?, text(&qcow2)?])?;
            let uri = device::uri(&socket);
            qemu_img(&["convert", "-n", "-W", "-f", "qcow2", "-O", "raw", text(&qcow2)?, &uri])?;
            qemu_img(&["compare", "-f", "qcow2", "-F", "raw", text(&qcow2)?, &uri]).context("the volume")?;
            view_equals_source(rig, &image)?;
            let view = rig.sites.open_view(GROUP, "latest", true)?;
            let out = rig.dir().join("out.qcow2");
            let view_uri = device::uri(&device::view_socket(&view, VOLUME)?);
            qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &view_uri, text(&out)?])?;
            qemu_img(&["compare", "-s", "-f", "qcow2", "-F", "qcow2", text(&qcow2)?, text(&out)?])
                .context("out of the view")?;
            rig.sites.close_view(&view)?;
            rig.check_point("latest", &wanted)
        },
    );
}

#[test]
fn fua_zeroes_and_discard_are_what_they_say() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, socket, _) = rig.protect(16 * MIB, 1)?;
            rig.wait()?;
            let commands = [
                "write -P 0xa1 0 1M",
                "write -f -P 0xa2 64k 64k",
                "write -z 256k 128k",
                "write -z -u 512k 64k",
                "discard 640k 64k",
                "write -P 0xa3 333k 1536",
                "write -z 900k 512",
                "aio_write -P 0xa4 2M 512k",
                "aio_write -P 0xa5 3M 64k",
                "aio_flush",
                "flush",
            ];
            let checks = [
                "read -P 0xa1 0 64k",
                "read -P 0xa2 64k 64k",
                "read -P 0xa1 128k 128k",
                "read -P 0 256k 77k",
                "read -P 0xa3 333k 1536",
                "read -P 0 343552 49664",
                "read -P 0xa1 384k 128k",
                "read -P 0 512k 64k",
                "read -P 0xa1 576k 64k",
                "read -P 0 640k 64k",
                "read -P 0 900k 512",
                "read -P 0xa1 922112 512",
                "read -P 0xa4 2M 512k",
                "read -P 0xa5 3M 64k",
            ];
            qemu_io(&device::uri(&socket), &commands)?;
            qemu_io(&device::uri(&socket), &checks).context("the volume")?;
            rig.wait()?;
            rig.bookmark("written")?;
            view_equals_source(rig, &image)?;
            qemu_io(&device::uri(&socket), &["write -P 0xbb 0 4M", "flush"])?;
            rig.sites.wait(GROUP, LIMIT_SECONDS)?;
            check_view(rig, &checks)?;
            view_equals_source(rig, Path::new(&image))
        },
    );
}

/// The bookmark still shows the patterns; the same operations work on the view itself and do not reach the replica.
fn check_view(rig: &Rig, checks: &[&str]) -> Result<()> {
    let view = rig.sites.open_view(GROUP, "bookmark:written", false)?;
    let uri = device::uri(&device::view_socket(&view, VOLUME)?);
    qemu_io(&uri, checks).context("the view")?;
    let scratch = ["write -f -P 0xc1 0 96k", "write -z 128k 64k", "discard 2M 64k", "flush"];
    qemu_io(&uri, &scratch).context("write to the view")?;
    qemu_io(&uri, &["read -P 0xc1 0 96k", "read -P 0xa2 96k 32k", "read -P 0 128k 64k", "read -P 0 2M 64k"])?;
    rig.sites.close_view(&view)?;
    let again = rig.sites.open_view(GROUP, "bookmark:written", true)?;
    qemu_io_read_only(&device::uri(&device::view_socket(&again, VOLUME)?), checks).context("the view, opened again")?;
    rig.sites.close_view(&again)
}
