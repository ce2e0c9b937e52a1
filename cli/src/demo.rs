//! `farshore demo`: both sites on loopback, real processes, real writes, real failures, every byte checked.
//!
//! A guest writes through NBD; the demonstration keeps hashes of what the guest's volume held at three named moments and
//! compares them with views of the points that were made then.

mod guest;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farshore_nbd::client::{Client, Options};
use farshore_proto::text::show_size;
use serde_json::{Value, json};

use crate::args::DemoArgs;
use crate::failure::Failure;
use crate::output::Output;
use crate::sites::{Sites, SitesConfig};
use guest::Guest;

const GROUP: &str = "demo";
const VOLUME: &str = "disk";
/// How long a step may wait for replication to catch up on a busy machine.
const CATCH_UP_SECONDS: u64 = 120;
/// Smallest volume with room for all that the demonstration does.
const SIZE_MIN: u64 = 16 << 20;

/// Runs the demonstration.
pub(crate) fn run(args: &DemoArgs, output: &Output) -> Result<()> {
    if args.size < SIZE_MIN || !args.size.is_multiple_of(4096) {
        return Err(Failure::usage("--size", "is not a multiple of 4 KiB from 16 MiB up").into());
    }
    let temporary;
    let dir = match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
            dir.join(format!("farshore-demo-{}", std::process::id()))
        }
        None => {
            temporary =
                tempfile::Builder::new().prefix("farshore-demo-").tempdir().context("make a temporary folder")?;
            temporary.path().join("run")
        }
    };
    std::fs::create_dir(&dir).with_context(|| format!("create {}", dir.display()))?;
    let kept = args.keep.then(|| dir.clone());
    let mut story = Story::start(args, &dir, output)?;
    let result = story.tell();
    if result.is_err() {
        for line in story.sites.logs().iter().rev().take(20).rev() {
            eprintln!("{line}");
        }
    }
    let report = result?;
    drop(story);
    match kept {
        Some(dir) => output.line(&format!("kept in {}", dir.display())),
        None if args.dir.is_some() => std::fs::remove_dir_all(&dir).context("remove the demonstration's folder")?,
        None => {}
    }
    if output.is_json() {
        output.document(&report);
    }
    Ok(())
}

/// A named moment: what the volume held then.
struct Moment {
    bookmark: &'static str,
    hashes: Vec<blake3::Hash>,
}

struct Story<'a> {
    output: &'a Output,
    begin: Instant,
    phase: Duration,
    image: PathBuf,
    socket: PathBuf,
    sites: Sites,
    guest: Guest,
    moments: Vec<Moment>,
}

impl<'a> Story<'a> {
    fn start(args: &DemoArgs, dir: &Path, output: &'a Output) -> Result<Self> {
        let begin = Instant::now();
        let image = dir.join("source.img");
        guest::make_image(&image, args.size)?;
        let mut config = SitesConfig::new(std::env::current_exe().context("find this program")?, dir);
        config.ring = 32 << 20;
        let sites = Sites::start(config)?;
        let socket = sites.protect(&image, GROUP, VOLUME)?;
        let guest = Guest::new(&socket, args.size)?;
        let phase = Duration::from_secs(args.seconds) / 4;
        let story = Self { output, begin, phase, image, socket, sites, guest, moments: Vec::new() };
        story.say(&format!(
            "both sites run; {} of {} is protected as {GROUP}/{VOLUME}",
            story.image.display(),
            show_size(args.size)
        ));
        Ok(story)
    }

    fn say(&self, text: &str) {
        if !self.output.is_json() {
            self.output.line(&format!("[{:6.1} s] {text}", self.begin.elapsed().as_secs_f64()));
        }
    }

    fn tell(&mut self) -> Result<Value> {
        self.initial_sync()?;
        self.undisturbed()?;
        self.link_break()?;
        self.agent_crash()?;
        self.target_crash()?;
        let figures = self.caught_up()?;
        self.check_points()?;
        self.check_scratch()?;
        self.check_restore()?;
        self.say("all checks hold");
        Ok(
            json!({ "ok": true, "seconds": self.begin.elapsed().as_secs_f64(), "written_bytes": self.guest.written(), "status": figures }),
        )
    }

    fn initial_sync(&mut self) -> Result<()> {
        let point = self.sites.wait(GROUP, CATCH_UP_SECONDS)?;
        self.say(&format!("initial sync is done; first recovery point is {}", text(&point, "id")));
        Ok(())
    }

    fn undisturbed(&mut self) -> Result<()> {
        let written = self.guest.write_for(self.phase)?;
        self.say(&format!("the guest wrote {}", show_size(written)));
        self.mark("first")
    }

    fn link_break(&mut self) -> Result<()> {
        self.sites.link().cut();
        let written = self.guest.write_for(self.phase)?;
        let status = self.status()?;
        self.say(&format!(
            "link cut: the guest wrote {} more without an error; tier is {}, RPO {:.1} s",
            show_size(written),
            text(&status, "tier"),
            status["rpo_s"].as_f64().unwrap_or_default()
        ));
        self.sites.link().heal();
        self.sites.wait(GROUP, CATCH_UP_SECONDS)?;
        self.say("link healed: everything is recoverable again");
        self.mark("second")
    }

    fn agent_crash(&mut self) -> Result<()> {
        self.guest.begin_writes(self.phase / 2)?;
        self.sites.kill_agent();
        self.sites.start_agent()?;
        let again = self.guest.reconnect(&self.socket)?;
        self.say(&format!(
            "agent killed (-9) under load and started again; the guest repeated {again} writes that were in flight"
        ));
        self.guest.write_for(self.phase / 2)?;
        self.sites.wait(GROUP, CATCH_UP_SECONDS)?;
        self.mark("third")
    }

    fn target_crash(&mut self) -> Result<()> {
        self.guest.begin_writes(self.phase / 2)?;
        self.sites.kill_target();
        self.guest.drain()?;
        let written = self.guest.write_for(self.phase / 2)?;
        self.sites.start_target()?;
        self.say(&format!("target killed (-9) and started again; the guest wrote {} meanwhile", show_size(written)));
        Ok(())
    }

    fn caught_up(&mut self) -> Result<Value> {
        self.guest.flush()?;
        let point = self.sites.wait(GROUP, CATCH_UP_SECONDS)?;
        let status = self.status()?;
        let field = |key: &str| status[key].as_u64().unwrap_or_default();
        self.say(&format!(
            "caught up at {}: since the agent's start {} written, {} on the wire, round trip {:.1} ms",
            text(&point, "id"),
            show_size(field("written_bytes")),
            show_size(field("wire_bytes")),
            status["link"]["rtt_s"].as_f64().unwrap_or_default() * 1000.0
        ));
        Ok(status)
    }

    fn mark(&mut self, bookmark: &'static str) -> Result<()> {
        self.guest.flush()?;
        let body = json!({ "group": GROUP, "name": bookmark, "timeout_s": CATCH_UP_SECONDS });
        let point = self.sites.agent().post("/v1/bookmark", &body)?;
        // Nobody writes now, so this is what the point must show.
        let hashes = hash_device(&self.socket)?;
        self.moments.push(Moment { bookmark, hashes });
        self.say(&format!("bookmark {bookmark:?} is point {} of {}", text(&point, "id"), text(&point, "time")));
        Ok(())
    }

    fn check_points(&self) -> Result<()> {
        for moment in &self.moments {
            let begin = Instant::now();
            let view = self.sites.open_view(GROUP, &format!("bookmark:{}", moment.bookmark), true)?;
            let device = view_socket(&view)?;
            let mut client = Client::connect_unix(&device, &Options::default()).context("connect to the view")?;
            client.read(0, 4096).context("read from the view")?;
            let first = begin.elapsed();
            drop(client);
            let hashes = hash_device(&device)?;
            let bad = hashes.iter().zip(&moment.hashes).filter(|(a, b)| a != b).count();
            ensure!(
                bad == 0 && hashes.len() == moment.hashes.len(),
                "view of {:?}: {bad} of {} MiB differ from what the guest had",
                moment.bookmark,
                hashes.len()
            );
            self.sites.close_view(&view)?;
            self.say(&format!(
                "view of {:?}: first read after {:.0} ms, every byte as the guest had it",
                moment.bookmark,
                first.as_secs_f64() * 1000.0
            ));
        }
        Ok(())
    }

    /// A view may be written to; neither the replica nor another view sees that.
    fn check_scratch(&self) -> Result<()> {
        let view = self.sites.open_view(GROUP, "bookmark:second", false)?;
        let device = view_socket(&view)?;
        let mut client = Client::connect_unix(&device, &Options::default()).context("connect to the view")?;
        client.write(0, &[0xee; 65_536], true).context("write to the view")?;
        ensure!(
            client.read(0, 65_536)?.iter().all(|byte| *byte == 0xee),
            "the view does not show what was written to it"
        );
        drop(client);
        self.sites.close_view(&view)?;
        let again = self.sites.open_view(GROUP, "bookmark:second", true)?;
        let hashes = hash_device(&view_socket(&again)?)?;
        let moment = self.moments.iter().find(|moment| moment.bookmark == "second").context("the second moment")?;
        ensure!(hashes == moment.hashes, "writing to a view changed the replica");
        self.sites.close_view(&again)?;
        self.say("a view was written to; the replica did not change");
        Ok(())
    }

    /// The newest point, copied out, equals the source after a clean stop.
    fn check_restore(&mut self) -> Result<()> {
        self.guest.disconnect()?;
        self.sites.stop_agent()?;
        let out = self.sites.path("restored.img");
        let body = json!({ "volume": format!("{GROUP}/{VOLUME}"), "at": "latest", "out": out });
        let target = self.sites.target();
        let started = target.post("/v1/restore", &body)?;
        loop {
            let job = target.get(&format!("/v1/job?id={}", text(&started, "job")))?;
            ensure!(job["state"] != "failed", "restore failed: {}", job["error"]);
            if job["state"] == "done" {
                break;
            }
            crate::sites::pause(Duration::from_millis(50));
        }
        ensure!(guest::same_bytes(&self.image, &out)?, "the restored image differs from the source");
        self.say("restored the newest point: equal to the source, bit for bit");
        Ok(())
    }

    fn status(&self) -> Result<Value> {
        let all = self.sites.agent().get(&format!("/v1/status?group={GROUP}"))?;
        Ok(all[0].clone())
    }
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap_or("-")
}

fn view_socket(view: &Value) -> Result<PathBuf> {
    let device = view["volumes"][0]["device"].as_str().context("the view names no device")?;
    let path = device.split_once("socket=").context("the view is not on a unix socket")?.1;
    Ok(PathBuf::from(path))
}

/// One hash per MiB.
fn hash_device(socket: &Path) -> Result<Vec<blake3::Hash>> {
    const PIECE: u32 = 1 << 20;
    let mut client = Client::connect_unix(socket, &Options::default()).context("connect to a device")?;
    let size = client.info().size;
    let mut hashes = Vec::new();
    let mut offset = 0;
    while offset < size {
        let len = u32::try_from(u64::from(PIECE).min(size - offset)).context("a piece fits")?;
        hashes.push(blake3::hash(&client.read(offset, len).context("read a device")?));
        offset += u64::from(len);
    }
    client.disconnect().context("leave a device")?;
    Ok(hashes)
}
