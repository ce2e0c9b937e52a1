//! fio writes, reads back and checks; then the view at latest must equal the source.

use std::process::Command;

use anyhow::{Context, Result};

use super::{text, view_equals_source};
use crate::support::{MIB, Rig, device};
use farshore_cli::sites::run::{find, run};

/// One fio job of these arguments over NBD on a protected volume of 64 MiB.
fn verified(args: &[&str]) {
    Rig::test(
        |config| config.ring = 64 << 20,
        |rig| {
            let (image, socket, _) = rig.protect(64 * MIB, 1)?;
            fio(&device::uri(&socket), args)?;
            view_equals_source(rig, &image)
        },
    );
}

fn fio(uri: &str, args: &[&str]) -> Result<()> {
    let folder = tempfile::tempdir().context("a folder for fio")?;
    let uri = format!("--uri={uri}");
    // A fixed seed; no state file of the verification is left behind.
    let common = ["--name=job", "--ioengine=nbd", &uri, "--size=64m", "--randseed=7", "--verify_state_save=0"];
    let mut command = Command::new(find("fio", "fio")?);
    let place = format!("--aux-path={}", text(folder.path())?);
    command.args(common).args(args).arg(place).current_dir(folder.path());
    run(&mut command)?.ok().map(drop)
}

#[test]
fn random_writes_of_4_kib_verify() {
    verified(&["--rw=randwrite", "--bs=4k", "--iodepth=16", "--io_size=48m", "--verify=crc32c", "--verify_fatal=1"]);
}

#[test]
fn sequential_writes_of_128_kib_verify() {
    verified(&["--rw=write", "--bs=128k", "--iodepth=8", "--verify=crc32c", "--verify_fatal=1"]);
}

#[test]
fn writes_mixed_with_trims_verify() {
    verified(&[
        // Each block is trimmed, then written; fio itself keeps the two in order.
        "--rw=randtrimwrite",
        "--bs=16k",
        "--iodepth=8",
        "--serialize_overlap=1",
        "--io_size=32m",
        "--verify=crc32c",
        "--verify_fatal=1",
    ]);
}

/// Flushes, reads and trims besides writes, several jobs at once: nothing to verify for fio, all the more for the view.
#[test]
fn a_mixture_of_everything_leaves_a_view_that_equals_the_source() {
    verified(&[
        "--rw=randrw",
        "--bssplit=4k/60:16k/20:64k/15:256k/5",
        "--iodepth=16",
        "--numjobs=2",
        "--io_size=48m",
        "--fsync=64",
        "--norandommap=1",
        "--buffer_compress_percentage=50",
        "--refill_buffers=1",
    ]);
}
