//! The control device: one command of the kernel per call.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use zerocopy::{FromBytes, IntoBytes};
use zeroize::Zeroizing;

use super::node::DevNo;
use super::sys::{CONTROL_PATH, Command, Header, NameEntry, flag, udev};
use super::table::{Table, garbled, text};
use crate::error::{Error, ErrorKind};

/// First buffer of an answer, and the longest: some ten thousand targets.
const ANSWER_BYTES: usize = 16 << 10;
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// How often a command that a signal broke off is tried again.
const TRIES_MAX: u32 = 16;

/// Which device a command is about.
#[derive(Clone, Copy, Debug)]
enum Who<'a> {
    None,
    Number(DevNo),
    Name(&'a str),
    New { name: &'a str, uuid: &'a str },
}

/// A device, as the kernel describes it.
#[derive(Clone, Debug)]
pub(super) struct Status {
    pub(super) device: DevNo,
    pub(super) name: String,
    /// Empty: it has none.
    pub(super) uuid: String,
    /// By how many it is open: mounts, devices above, processes.
    pub(super) users: u32,
    flags: u32,
}

impl Status {
    #[cfg(test)]
    pub(super) fn for_test(device: DevNo, name: &str, uuid: &str) -> Self {
        Self { device, name: name.to_owned(), uuid: uuid.to_owned(), users: 0, flags: 0 }
    }

    pub(super) fn is_suspended(&self) -> bool {
        self.flags & flag::SUSPEND != 0
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.flags & flag::READ_ONLY != 0
    }

    pub(super) fn has_table(&self) -> bool {
        self.flags & flag::ACTIVE_PRESENT != 0
    }

    /// A table is loaded and not yet in place.
    pub(super) fn has_inactive_table(&self) -> bool {
        self.flags & flag::INACTIVE_PRESENT != 0
    }
}

struct Answer {
    header: Header,
    bytes: Zeroizing<Vec<u8>>,
}

impl Answer {
    fn payload(&self) -> io::Result<&[u8]> {
        let end = self.bytes.len().min(self.header.data_size as usize);
        self.bytes.get(self.header.data_start as usize..end).ok_or_else(garbled)
    }

    fn status(&self) -> io::Result<Status> {
        Ok(Status {
            device: DevNo::from_kernel(self.header.dev),
            name: text(&self.header.name)?.to_owned(),
            uuid: text(&self.header.uuid)?.to_owned(),
            users: u32::try_from(self.header.open_count).unwrap_or(0),
            flags: self.header.flags,
        })
    }
}

/// The kernel's device mapper.
#[derive(Debug)]
pub(super) struct Mapper {
    control: File,
}

impl Mapper {
    /// Opens `/dev/mapper/control` and asks for the interface's version.
    ///
    /// # Errors
    /// `NoDriver`: this kernel has no device mapper, or it is not loaded; `Permission`; `System`.
    pub(super) fn open() -> Result<Self, Error> {
        let control = File::options().read(true).write(true).open(CONTROL_PATH).map_err(open_error)?;
        let mapper = Self { control };
        let answer = mapper.run(Command::Version, Who::None, 0, 0, &[]).map_err(open_error)?;
        let [major, minor, patch] = answer.header.version;
        tracing::debug!(major, minor, patch, "device mapper");
        Ok(mapper)
    }

    /// The control device itself; a lock on it keeps interposers of other processes away.
    pub(super) fn control(&self) -> &File {
        &self.control
    }

    /// All devices.
    pub(super) fn list(&self) -> io::Result<Vec<DevNo>> {
        let answer = self.run(Command::ListDevices, Who::None, 0, 0, &[])?;
        let payload = answer.payload()?;
        let mut devices = Vec::new();
        let mut at = 0;
        while let Some(entry) = payload.get(at..).filter(|entry| entry.len() >= size_of::<NameEntry>()) {
            let (entry, _) = NameEntry::read_from_prefix(entry).map_err(|_| garbled())?;
            if entry.dev == 0 {
                break;
            }
            devices.push(DevNo::from_kernel(entry.dev));
            if entry.next == 0 {
                break;
            }
            at += entry.next as usize;
        }
        devices.sort_unstable();
        Ok(devices)
    }

    /// Makes a device without a table.
    pub(super) fn create(&self, name: &str, uuid: &str) -> io::Result<DevNo> {
        let answer = self.run(Command::DevCreate, Who::New { name, uuid }, 0, 0, &[])?;
        Ok(DevNo::from_kernel(answer.header.dev))
    }

    /// Removes a device; the kernel refuses (`EBUSY`) while it is open.
    pub(super) fn remove(&self, device: DevNo, cookie: u32) -> io::Result<()> {
        self.run(Command::DevRemove, Who::Number(device), 0, cookie, &[]).map(drop)
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut payload = to.as_bytes().to_vec();
        payload.push(0);
        self.run(Command::DevRename, Who::Name(from), 0, udev::HIDDEN, &payload).map(drop)
    }

    /// Describes a device.
    pub(super) fn status(&self, device: DevNo) -> io::Result<Status> {
        self.run(Command::DevStatus, Who::Number(device), 0, 0, &[])?.status()
    }

    /// Describes the device of a name.
    pub(super) fn status_of_name(&self, name: &str) -> io::Result<Status> {
        self.run(Command::DevStatus, Who::Name(name), 0, 0, &[])?.status()
    }

    /// Loads a table beside the one in place. The devices below are opened, and claimed for the device mapper.
    pub(super) fn load(&self, device: DevNo, table: &Table) -> io::Result<()> {
        let count = u32::try_from(table.targets.len()).map_err(|_| garbled())?;
        let payload = table.encode();
        self.run_with(Command::TableLoad, Who::Number(device), flag::SECURE_DATA, 0, &payload, count).map(drop)
    }

    /// Forgets a table that was loaded and is not in place.
    pub(super) fn clear(&self, device: DevNo) -> io::Result<()> {
        self.run(Command::TableClear, Who::Number(device), 0, 0, &[]).map(drop)
    }

    /// The table in place, keys included.
    pub(super) fn table(&self, device: DevNo) -> io::Result<Table> {
        self.table_with(device, 0)
    }

    /// The table that is loaded and not in place.
    pub(super) fn inactive_table(&self, device: DevNo) -> io::Result<Table> {
        self.table_with(device, flag::QUERY_INACTIVE)
    }

    fn table_with(&self, device: DevNo, which: u32) -> io::Result<Table> {
        // Without NOFLUSH the kernel may send a flush to some targets before it answers.
        let flags = flag::STATUS_TABLE | flag::SECURE_DATA | flag::NOFLUSH | which;
        let answer = self.run(Command::TableStatus, Who::Number(device), flags, 0, &[])?;
        Table::decode(answer.payload()?, answer.header.target_count)
    }

    /// The devices on which the table in place stands.
    pub(super) fn dependencies(&self, device: DevNo) -> io::Result<Vec<DevNo>> {
        let answer = self.run(Command::TableDeps, Who::Number(device), 0, 0, &[])?;
        let payload = answer.payload()?;
        let (count, rest) = u32::read_from_prefix(payload).map_err(|_| garbled())?;
        let devices = rest.get(4..).ok_or_else(garbled)?;
        let mut found = Vec::new();
        for bytes in devices.chunks_exact(8).take(count as usize) {
            found.push(DevNo::from_kernel(u64::read_from_bytes(bytes).map_err(|_| garbled())?));
        }
        Ok(found)
    }

    /// Holds back new requests and waits for those under way. With `lockfs` a mounted file system writes out and freezes first.
    pub(super) fn suspend(&self, device: DevNo, lockfs: bool) -> io::Result<()> {
        let flags = flag::SUSPEND | if lockfs { 0 } else { flag::SKIP_LOCKFS | flag::NOFLUSH };
        self.run(Command::DevSuspend, Who::Number(device), flags, 0, &[]).map(drop)
    }

    /// Puts the loaded table in place, if there is one, and resumes the device; suspends it before where that is not done. One
    /// command: no death of this process leaves the device in between. See [`super`] for the flags.
    pub(super) fn resume(&self, device: DevNo, cookie: u32) -> io::Result<()> {
        let flags = flag::SKIP_LOCKFS | flag::NOFLUSH;
        self.run(Command::DevSuspend, Who::Number(device), flags, cookie, &[]).map(drop)
    }

    fn run(&self, command: Command, who: Who<'_>, flags: u32, cookie: u32, payload: &[u8]) -> io::Result<Answer> {
        self.run_with(command, who, flags, cookie, payload, 0)
    }

    /// Runs a command; again with more room where its answer did not fit.
    fn run_with(
        &self,
        command: Command,
        who: Who<'_>,
        flags: u32,
        cookie: u32,
        payload: &[u8],
        targets: u32,
    ) -> io::Result<Answer> {
        let head = size_of::<Header>();
        let mut length = (head + payload.len()).max(ANSWER_BYTES);
        loop {
            let mut header = Header::new();
            header.data_size = u32::try_from(length).map_err(|_| garbled())?;
            header.data_start = u32::try_from(head).expect("312");
            header.target_count = targets;
            header.flags = flags;
            header.event_nr = cookie;
            address(&mut header, who)?;
            let mut bytes = Zeroizing::new(vec![0; length]);
            bytes[..head].copy_from_slice(header.as_bytes());
            bytes[head..head + payload.len()].copy_from_slice(payload);
            self.ioctl(command, &mut bytes)?;
            let (header, _) = Header::read_from_prefix(&bytes).map_err(|_| garbled())?;
            if header.flags & flag::BUFFER_FULL == 0 {
                return Ok(Answer { header, bytes });
            }
            length *= 2;
            if length > ANSWER_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is longer than 1 MiB"));
            }
        }
    }

    fn ioctl(&self, command: Command, bytes: &mut [u8]) -> io::Result<()> {
        for _ in 0..TRIES_MAX {
            // SAFETY: the command's argument is a buffer that begins with a header whose `data_size` is the buffer's length
            // (`run_with`); the kernel reads and writes no further than that, and keeps no reference after the call. The
            // descriptor is open as long as `self`.
            let result =
                unsafe { libc::ioctl(self.control.as_raw_fd(), u64::from(command.code()), bytes.as_mut_ptr()) };
            if result >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }
}

fn address(header: &mut Header, who: Who<'_>) -> io::Result<()> {
    match who {
        Who::None => {}
        Who::Number(device) => header.dev = device.to_kernel(),
        Who::Name(name) => put(&mut header.name, name)?,
        Who::New { name, uuid } => {
            put(&mut header.name, name)?;
            put(&mut header.uuid, uuid)?;
        }
    }
    Ok(())
}

/// Text with a zero behind it.
fn put(to: &mut [u8], text: &str) -> io::Result<()> {
    if text.len() >= to.len() || text.contains('\0') {
        let what = format!("`{text}` is too long for a name of the device mapper: at most {} bytes", to.len() - 1);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    to[..text.len()].copy_from_slice(text.as_bytes());
    Ok(())
}

fn open_error(error: io::Error) -> Error {
    let with = |kind, reason: &str| Error::new(kind, format!("cannot use {CONTROL_PATH}: {reason}"));
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => with(
            ErrorKind::NoDriver,
            "no device mapper: load it with `modprobe dm_mod`; if there is no such module (CONFIG_BLK_DEV_DM), protect the \
             device without the interposer: through its ublk or NBD device",
        ),
        Some(libc::EACCES | libc::EPERM) => {
            with(ErrorKind::Permission, "not allowed: run as root (CAP_SYS_ADMIN)").because(error)
        }
        _ => with(ErrorKind::System, "the operating system refused").because(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_with_a_zero_or_are_refused() {
        let mut field = [1u8; 4];
        assert!(put(&mut field, "abcd").is_err());
        assert!(put(&mut field, "a\0").is_err());
        field = [0; 4];
        assert!(put(&mut field, "abc").is_ok());
        assert_eq!(&field, b"abc\0");
    }

    /// On a machine without the driver this is the real thing; with it, the driver answers.
    #[test]
    fn opening_says_what_is_wrong_or_works() {
        match Mapper::open() {
            Ok(mapper) => assert!(mapper.list().is_ok()),
            Err(error) => {
                assert!(error.to_string().contains(CONTROL_PATH) && error.kind() != ErrorKind::System, "{error}")
            }
        }
    }
}
