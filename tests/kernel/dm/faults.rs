//! Every step fails, and every step is the last of its process.

use std::io;

use anyhow::{Context, Result, ensure};
use farshore_ublk::dm::{Change, Interposer, LeftoverKind, Step};

use super::{Writer, dies, kit, logical_volumes, lvm, no_strays, pass_through, table};
use crate::rig::{Mounted, pattern, run};

fn failing_at(at: Step) -> Result<Interposer> {
    let fail = move |step| if step == at { Err(io::Error::other("told to fail")) } else { Ok(()) };
    Ok(Interposer::open()?.with_hook(fail))
}

/// Goal: an attach that fails changes nothing; a detach that fails changes nothing or has only leftovers to remove. Method: each step
/// fails, under a mounted file system with a writer.
#[test]
fn a_failed_step_is_undone() -> Result<()> {
    let interposer = kit()?;
    let upper = &logical_volumes(&["256M"])?[0];
    let original = table(upper)?;
    run(&format!("mkfs.ext4 -q {}", upper.display()))?;
    let mounted = Mounted::new(upper)?;
    let writer = Writer::start(&mounted.folder().join("file"))?;
    let mut serve = pass_through();
    for step in Step::ATTACH {
        let error = failing_at(step)?.attach(upper, &mut serve).expect_err("a step failed");
        let reason = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        ensure!(reason.contains("told to fail"), "{step:?}: {error}: {reason}");
        ensure!(table(upper)? == original, "{step:?}");
        no_strays().with_context(|| format!("attach failed at {step:?}"))?;
        writer.more(20)?;
    }
    for step in Step::DETACH {
        let attached = interposer.attach(upper, &mut serve)?;
        failing_at(step)?.detach(&attached, &mut serve).expect_err("a step failed");
        writer.more(20)?;
        match step {
            Step::LoadUpper | Step::Swap | Step::Verify => {
                ensure!(interposer.change(&attached)? == Change::None, "{step:?}: all is as before");
                interposer.detach(&attached, &mut serve)?;
            }
            Step::StopServing => {
                ensure!(table(upper)? == original);
                interposer.abandon(&attached, &mut serve)?;
            }
            Step::RemoveLower | Step::Done | _ => {
                ensure!(table(upper)? == original);
                for left in interposer.leftovers()? {
                    ensure!(step == Step::RemoveLower && left.kind == LeftoverKind::Unused, "{left:?}");
                    interposer.repair(&left)?;
                }
            }
        }
        ensure!(table(upper)? == original, "{step:?}");
        no_strays().with_context(|| format!("detach failed at {step:?}"))?;
        writer.more(20)?;
    }
    writer.finish()?;
    mounted.unmount()?;
    run(&format!("e2fsck -fn {}", upper.display()))?;
    lvm("vgremove -ff -y vg").map(drop)
}

/// Goal: another tool's work in progress is left as it is: neither our table takes the place of the one that it has loaded, nor does the
/// undoing of our failed attach drop that, nor resume what it holds. Method: a table is loaded, or the device suspended, while the
/// attach is under way.
#[test]
fn another_tools_change_is_left_alone() -> Result<()> {
    let _interposer = kit()?;
    let upper = &logical_volumes(&["64M"])?[0];
    let original = table(upper)?;
    let name = upper.display();
    for (begin, state, end) in [
        ("dmsetup load", "LIVE & INACTIVE", "dmsetup clear"),
        ("dmsetup suspend --noflush", "SUSPENDED", "dmsetup resume"),
    ] {
        let told = upper.clone();
        let table_text = original.clone();
        let meanwhile = move |step| {
            if step != Step::Record {
                return Ok(());
            }
            let of = told.display();
            run(&format!("echo '{table_text}' | DM_DISABLE_UDEV=1 {begin} {of}")).map(drop).map_err(io::Error::other)
        };
        let attached = Interposer::open()?.with_hook(meanwhile).attach(upper, &mut pass_through());
        let error = attached.expect_err("another tool is at it").to_string();
        ensure!(error.contains("another tool"), "{error}");
        let now = run(&format!("dmsetup info {name}"))?;
        let (tables, is) = (now.contains("LIVE & INACTIVE"), now.contains("SUSPENDED"));
        ensure!(tables == (state == "LIVE & INACTIVE") && is == (state == "SUSPENDED"), "{begin}: {now}");
        run(&format!("DM_DISABLE_UDEV=1 {end} {name}"))?;
        ensure!(table(upper)? == original);
        no_strays()?;
    }
    lvm("vgremove -ff -y vg").map(drop)
}

/// Goal: a crash at any step is repaired, and a file system in use sees a pause at most. Method: kill -9 of the process that attaches or
/// detaches (and serves), before each step; repair by another.
#[test]
fn a_crash_at_any_step_is_repaired() -> Result<()> {
    let interposer = kit()?;
    let upper = &logical_volumes(&["256M"])?[0];
    let original = table(upper)?;
    run(&format!("mkfs.ext4 -q {}", upper.display()))?;
    let mounted = Mounted::new(upper)?;
    let kept = pattern(13, 2 << 20);
    std::fs::write(mounted.folder().join("kept"), &kept)?;
    let writer = Writer::start(&mounted.folder().join("file"))?;
    let jobs = Step::ATTACH.map(|step| ("attach", step)).into_iter().chain(Step::DETACH.map(|step| ("detach", step)));
    for (work, step) in jobs {
        dies(work, upper, step)?;
        let in_path = table(upper)? != original;
        let left = interposer.leftovers()?;
        ensure!(left.len() <= 1, "{left:?}");
        let nothing = (work, step) == ("attach", Step::CreateLower) || (work, step) == ("detach", Step::Done);
        ensure!(left.is_empty() == nothing, "{work} killed at {step:?}: {left:?}");
        for left in left {
            let expected = if in_path { LeftoverKind::DeadServer } else { LeftoverKind::Unused };
            ensure!(left.kind == expected && !left.description.is_empty(), "{work} killed at {step:?}: {left:?}");
            let repaired = interposer.repair(&left).with_context(|| format!("{work} killed at {step:?}: {left:?}"))?;
            ensure!(repaired.detached == in_path, "{repaired:?}");
        }
        ensure!(table(upper)? == original && interposer.leftovers()?.is_empty(), "{work} killed at {step:?}");
        no_strays().with_context(|| format!("{work} killed at {step:?}"))?;
        writer.more(20).with_context(|| format!("{work} killed at {step:?}"))?;
    }
    writer.finish()?;
    run("echo 3 > /proc/sys/vm/drop_caches")?;
    ensure!(std::fs::read(mounted.folder().join("kept"))? == kept);
    mounted.unmount()?;
    run(&format!("e2fsck -fn {}", upper.display()))?;
    lvm("vgremove -ff -y vg").map(drop)
}

/// Goal: an upper that is suspended goes on after a repair, attached as before; one whose ublk device died with its server gets its own
/// table; one that was removed leaves nothing. Method: make each.
#[test]
fn other_leftovers_are_repaired() -> Result<()> {
    let interposer = kit()?;
    let upper = &logical_volumes(&["64M"])?[0];
    let original = table(upper)?;
    let mut serve = pass_through();
    let attached = interposer.attach(upper, &mut serve)?;
    for freeze in [false, true] {
        interposer.hold(attached.upper, freeze)?;
        let left = interposer.leftovers()?;
        ensure!(left.len() == 1 && left[0].kind == LeftoverKind::Suspended, "{left:?}");
        let repaired = interposer.repair(&left[0])?;
        ensure!(!repaired.detached && repaired.done.len() == 1, "{repaired:?}");
        ensure!(interposer.leftovers()?.is_empty() && interposer.change(&attached)? == Change::None);
        run(&format!("dd if=/dev/zero of={} bs=4k count=64 oflag=direct", upper.display()))?;
    }
    // Removed under us.
    lvm("lvchange -an vg/data0")?;
    ensure!(interposer.change(&attached)? == Change::UpperGone);
    interposer.abandon(&attached, &mut serve)?;
    no_strays()?;
    lvm("lvchange -ay vg/data0")?;
    ensure!(table(upper)? == original);

    dies("mortal", upper, Step::Done)?;
    let left = interposer.leftovers()?;
    ensure!(left.len() == 1 && left[0].kind == LeftoverKind::DeadServer, "{left:?}");
    ensure!(interposer.repair(&left[0])?.detached);
    ensure!(table(upper)? == original);
    no_strays()?;
    run(&format!("dd if={} of=/dev/null bs=4k count=64 iflag=direct", upper.display()))?;
    lvm("vgremove -ff -y vg").map(drop)
}
