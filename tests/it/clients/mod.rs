//! Real clients of the NBD front end: fio, QEMU's tools, libnbd's tools, and a database on a file system.

mod fio;
mod libnbd;
mod postgres;
mod qemu;

use std::path::Path;

use anyhow::{Context, Result};
use farshore_cli::sites::run::{call, find, text};

use crate::support::rig::{GROUP, VOLUME};
use crate::support::{Rig, device};

/// The newest point equals the source, as a foreign program sees both.
fn view_equals_source(rig: &Rig, image: &Path) -> Result<()> {
    rig.wait()?;
    let view = rig.sites.open_view(GROUP, "latest", true)?;
    let uri = device::uri(&device::view_socket(&view, VOLUME)?);
    let qemu_img = find("qemu-img", "qemu-utils")?;
    call(qemu_img, ["compare", "-f", "raw", "-F", "raw", text(image)?, &uri]).context("the view equals the source")?;
    rig.sites.close_view(&view)
}
