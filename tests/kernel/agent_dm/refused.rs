//! What cannot be protected through the device mapper is refused, and stays as it was.

use std::fs::File;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::json;

use super::{GROUP, Rig};
use crate::dm::{logical_volumes, mapped, no_strays, pass_through, table, unmapped};
use crate::rig::{DISK_512, DISK_4096, Mounted, fio, run};

/// Protects in vain; the reason is told, and nothing is there that was not before.
fn refused(rig: &Rig, source: &Path, reason: &str) -> Result<()> {
    let error = rig.protect(source, "no").expect_err("it is refused");
    let text = format!("{error:#}");
    ensure!(text.contains(reason), "{}: {text}", source.display());
    let volumes = rig.sites.agent().get("/v1/volumes")?;
    ensure!(volumes == json!([]), "{}: {volumes:#}", source.display());
    no_strays()
}

/// Goal: no volume, no device and the table of before, whatever is wrong. Method: one of each.
#[test]
fn what_cannot_be_protected_is_refused() -> Result<()> {
    Rig::test(|rig| {
        let image = rig.folder.path().join("image");
        File::create(&image)?.set_len(1 << 20)?;
        refused(rig, &image, "no block device")?;
        refused(rig, Path::new("/dev/mapper/none"), "not found")?;
        let origin = mapped("base", &format!("0 8192 linear {DISK_512} 2048"))?;
        let cow = mapped("cow", &format!("0 8192 linear {DISK_512} 20480"))?;
        let snapshot = mapped("snap", &format!("0 8192 snapshot {} {} N 8", origin.display(), cow.display()))?;
        refused(rig, &snapshot, "`snapshot` target")?;
        let plain = mapped("plain", &format!("0 8192 linear {DISK_4096} 20480"))?;
        let original = table(&plain)?;
        run("dmsetup suspend plain")?;
        refused(rig, &plain, "another tool")?;
        run("dmsetup resume plain")?;

        // By another process: another agent, or the library.
        let mut other = pass_through();
        let attached = rig.interposer.attach(&plain, &mut other)?;
        let error = rig.protect(&plain, "no").expect_err("it is attached");
        ensure!(format!("{error:#}").contains("attached already"), "{error:#}");
        fio(&plain, "--rw=randwrite --bs=4k --size=1m --verify=crc32c")?;
        rig.interposer.detach(&attached, &mut other)?;
        ensure!(table(&plain)? == original);
        let body = json!({ "source": plain, "group": GROUP, "name": "no", "dm": true, "frontend": "ublk:7" });
        let error = rig.sites.agent().post("/v1/protect", &body).expect_err("it chooses itself");
        ensure!(format!("{error:#}").contains("--dm"), "{error:#}");
        ensure!(table(&plain)? == original);
        no_strays()?;
        unmapped(&["snap", "cow", "base", "plain"])
    })
}

/// Goal: the agent's own files, and a device that is protected already, are not put below themselves.
#[test]
fn own_files_and_protected_devices_are_refused() -> Result<()> {
    Rig::test(|rig| {
        let upper = &logical_volumes(&["64M"])?[0];
        let original = table(upper)?;
        rig.protect_live(upper, "one")?;
        for source in [upper.clone(), rig.lower("one")?] {
            let error = rig.protect(&source, "two").expect_err("it is protected");
            let text = format!("{error:#}");
            ensure!(text.contains("protected already") || text.contains("lower half"), "{text}");
        }
        ensure!(rig.sites.agent().get("/v1/volumes")?.as_array().map(Vec::len) == Some(1));
        rig.unprotect("one")?;
        ensure!(table(upper)? == original);

        // An agent whose state lies on the volume.
        rig.stop_agent()?;
        run(&format!("mkfs.ext4 -q {}", upper.display()))?;
        let mounted = Mounted::new(upper)?;
        let (state, place) = (rig.sites.path("agent"), mounted.folder().join("state"));
        run(&format!("cp -a {0} {1} && mv {0} {0}.old && ln -s {1} {0}", state.display(), place.display()))?;
        rig.sites.start_agent()?;
        let error = rig.protect(upper, "one").expect_err("it holds the agent's state");
        ensure!(format!("{error:#}").contains("own"), "{error:#}");
        rig.stop_agent()?;
        run(&format!("rm {0} && mv {0}.old {0}", state.display()))?;
        mounted.unmount()?;
        rig.sites.start_agent()
    })
}
