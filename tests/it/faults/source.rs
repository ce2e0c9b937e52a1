//! Sources that are not what they should be.

use std::fs::File;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::support::rig::{GROUP, VOLUME};
use crate::support::{Guest, KIB, MIB, Rig, device, pattern, until};

fn text(path: &std::path::Path) -> Result<&str> {
    path.to_str().context("paths of tests are text")
}

#[test]
fn what_cannot_be_protected_is_refused_with_the_reason() {
    Rig::test(
        |_| {},
        |rig| {
            let missing = rig.dir().join("missing.img");
            let ran = rig.cli(&["protect", text(&missing)?, "--group", GROUP])?;
            ran.refused(3, "missing.img", false)?;

            let odd = rig.dir().join("odd.img");
            File::create_new(&odd)?.set_len(MIB + 100)?;
            let ran = rig.cli(&["protect", text(&odd)?, "--group", GROUP])?;
            ran.refused(1, "multiple of 512", false)?;

            let empty = rig.dir().join("empty.img");
            File::create_new(&empty)?;
            let ran = rig.cli(&["protect", text(&empty)?, "--group", GROUP])?;
            ensure!(ran.code.is_some_and(|code| (1..=4).contains(&code)), "refused: {ran}");

            let folder = rig.dir().join("folder");
            std::fs::create_dir(&folder)?;
            let ran = rig.cli(&["protect", text(&folder)?, "--group", GROUP])?;
            ensure!(ran.code.is_some_and(|code| (1..=4).contains(&code)), "refused: {ran}");

            let good = rig.dir().join("good.img");
            pattern::image(&good, 4 * MIB, 7)?;
            let ran = rig.cli(&["protect", text(&good)?, "--group", "a/b"])?;
            ran.refused(2, "a/b", false)?;
            let ran = rig.cli(&["protect", text(&good)?, "--group", GROUP, "--frontend", "carrier:pigeon"])?;
            ran.refused(2, "pigeon", false)?;

            let volumes = rig.cli(&["--json", "volumes"])?.json()?;
            ensure!(volumes == Value::Array(Vec::new()), "nothing is protected after all that: {volumes}");
            Ok(())
        },
    );
}

#[test]
fn a_source_in_use_is_refused() {
    Rig::test(
        |_| {},
        |rig| {
            let image = rig.dir().join("busy.img");
            pattern::image(&image, 4 * MIB, 7)?;
            let held = File::options().read(true).write(true).open(&image)?;
            held.lock().context("lock the image as a hypervisor does")?;
            let ran = rig.cli(&["protect", text(&image)?, "--group", GROUP])?;
            ran.refused(4, "busy.img", true)?;
            drop(held);
            rig.cli(&["protect", text(&image)?, "--group", GROUP, "--name", VOLUME])?.ok()?;

            // By now it is in use by the agent itself.
            let ran = rig.cli(&["protect", text(&image)?, "--group", GROUP, "--name", "again"])?;
            ran.refused(4, "busy.img", false)?;
            let other = rig.dir().join("other.img");
            pattern::image(&other, 4 * MIB, 8)?;
            let ran = rig.cli(&["protect", text(&other)?, "--group", GROUP, "--name", VOLUME])?;
            ran.refused(4, VOLUME, false)
        },
    );
}

/// Goal: a source that is gone or has another size at the start is not served and not replicated, with an alarm that says
/// why; the group's other volume is served as ever. Once the source is back all goes on.
#[test]
fn a_source_that_changed_while_nobody_looked_is_not_served() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, socket, model) = rig.protect(8 * MIB, 1)?;
            let second = rig.dir().join("second.img");
            let second_model = pattern::image(&second, 8 * MIB, 2)?;
            let second_socket = rig.sites.protect(&second, GROUP, "second")?;
            rig.wait()?;

            rig.sites.stop_agent()?;
            let away = rig.dir().join("away.img");
            std::fs::rename(&image, &away)?;
            rig.sites.start_agent()?;
            let alarm = rig.until_agent_alarm("volume.unavailable")?;
            ensure!(alarm.contains("source.img"), "the path is named: {alarm}");
            ensure!(device::connect(&socket).is_err(), "a volume without source is not served");
            let mut guest = Guest::new(&second_socket, second_model, 9)?;
            guest.work(50)?;
            guest.leave()?;

            rig.sites.stop_agent()?;
            std::fs::rename(&away, &image)?;
            File::options().write(true).open(&image)?.set_len(12 * MIB)?;
            rig.sites.start_agent()?;
            let alarm = rig.until_agent_alarm("volume.unavailable")?;
            ensure!(
                alarm.contains(&(8 * MIB).to_string()) && alarm.contains(&(12 * MIB).to_string()),
                "both sizes: {alarm}"
            );

            rig.sites.stop_agent()?;
            File::options().write(true).open(&image)?.set_len(8 * MIB)?;
            rig.sites.start_agent()?;
            until("the volume is served again", || Ok(device::connect(&socket).ok()))?;
            rig.wait()?;
            ensure!(rig.agent_alarm("volume.unavailable")?.is_none(), "the alarm is over");
            rig.check_point("latest", &model)?;
            device::same("the second volume", &rig.read_point("latest", "second")?, guest.model())
        },
    );
}

/// Goal: a volume leaves and comes back, and another joins, without a wrong byte; old points keep what they showed.
#[test]
fn volumes_leave_and_join() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, socket, model) = rig.protect(8 * MIB, 1)?;
            let mut guest = Guest::new(&socket, model, 2)?;
            rig.wait()?;
            guest.work(50)?;
            guest.flush()?;
            rig.bookmark("alone")?;
            let alone = guest.model().to_vec();

            let second = rig.dir().join("second.img");
            let second_model = pattern::image(&second, 4 * MIB, 3)?;
            rig.sites.protect(&second, GROUP, "second")?;
            guest.work(50)?;
            until("the second volume is in the points", || {
                rig.wait()?;
                let view = rig.sites.open_view(GROUP, "latest", true)?;
                let both = view["volumes"].as_array().is_some_and(|volumes| volumes.len() == 2);
                rig.sites.close_view(&view)?;
                Ok(both.then_some(()))
            })?;
            device::same("the second volume", &rig.read_point("latest", "second")?, &second_model)?;
            guest.leave()?;
            rig.cli(&["unprotect", &format!("{GROUP}/{VOLUME}")])?.ok()?;
            ensure!(device::connect(&socket).is_err(), "no longer served");
            rig.check_point("bookmark:alone", &alone)?;

            device::patch(&image, 64 * KIB, &pattern::bytes(77, 4096))?;
            let model = device::read_file(&image)?;
            let socket = rig.sites.protect(&image, GROUP, VOLUME)?;
            let mut guest = Guest::new(&socket, model, 4)?;
            guest.work(20)?;
            guest.flush()?;
            rig.wait()?;
            rig.check_point("latest", guest.model())?;
            rig.check_point("bookmark:alone", &alone)
        },
    );
}

/// Goal: an image that was written while the agent was stopped is compared, says so, and comes to the second site; one that was not is
/// not. Earlier points keep what they showed. Method: stop, change or not, start; a second volume beside it is never compared.
#[test]
fn what_is_written_behind_our_back_is_compared() {
    Rig::test(
        |_| {},
        |rig| {
            let (image, _, model) = rig.protect(8 * MIB, 1)?;
            let second = rig.dir().join("second.img");
            let second_model = pattern::image(&second, 8 * MIB, 2)?;
            rig.sites.protect(&second, GROUP, "second")?;
            rig.wait()?;
            rig.bookmark("before")?;
            let compared = |rig: &Rig| {
                let logs = rig.sites.logs();
                logs.into_iter().filter(|line| line.contains("the volume is compared")).collect::<Vec<_>>()
            };

            rig.sites.stop_agent()?;
            rig.sites.start_agent()?;
            ensure!(compared(rig).is_empty(), "nothing was written: {:?}", compared(rig));
            ensure!(rig.status()?["missing_bytes"] == 0, "{}", rig.status()?);
            rig.wait()?;

            rig.sites.stop_agent()?;
            device::patch(&image, 5 * MIB, &pattern::bytes(77, 4096))?;
            rig.sites.start_agent()?;
            let lines = compared(rig);
            ensure!(lines.len() == 1 && lines[0].contains(VOLUME) && lines[0].contains("changed"), "{lines:?}");
            rig.wait()?;
            ensure!(rig.agent_alarm("volume.bypassed")?.is_none(), "it is compared by now");
            rig.check_point("latest", &device::read_file(&image)?)?;
            device::same("the second volume", &rig.read_point("latest", "second")?, &second_model)?;
            rig.check_point("bookmark:before", &model)?;

            // The compare is over for good.
            rig.sites.stop_agent()?;
            rig.sites.start_agent()?;
            ensure!(compared(rig).is_empty(), "nothing was written: {:?}", compared(rig));

            // Nothing keeps a process that is no guest from opening the source.
            let beside = std::fs::File::options().append(true).open(&image)?;
            rig.sites.stop_agent()?;
            rig.sites.start_agent()?;
            let alarm = |rig: &Rig| rig.agent_alarm("volume.other-writer");
            until("an alarm names the process", || Ok(alarm(rig)?.map(drop)))?;
            let text = format!("{:?}", alarm(rig)?);
            ensure!(text.contains(&format!("process {} (", std::process::id())), "{text}");
            drop(beside);
            Ok(())
        },
    );
}
