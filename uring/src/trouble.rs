//! What an error of a disk means: one table, by error number. What is done about it differs at the two sites, and stands there
//! (`docs/errno.md` shows all of it).

use std::io;

use crate::Errno;

/// The nature of a disk's error.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// No space, or none that this user may have. Ends when somebody makes room; nothing was half done that could not be cut back.
    Full,
    /// The system lends nothing more at the moment (files, memory). Ends by itself, or when somebody raises a limit.
    Short,
    /// Not now: interrupted, or it would have to wait.
    Again,
    /// The device or the file system takes no writes any more.
    ReadOnly,
    /// The device is gone, or its way: it may come back, with or without what it was given last.
    Gone,
    /// The device failed: what it was given or asked for may be lost.
    Failed,
    /// It does not know the operation. Another way is tried where there is one.
    Unsupported,
    /// The operation makes no sense to it: a bug of ours, or a device that changed below us.
    Misused,
}

/// Number, name and nature. A number that is not here, or an error without one, is [`Trouble::Failed`]: the careful reading.
///
/// The block layer has a number for each of its states (`block/blk-core.c`, `blk_errors`); file systems add theirs.
pub const TROUBLES: [(i32, &str, Trouble); 37] = [
    (libc::ENOSPC, "ENOSPC", Trouble::Full),
    (libc::EDQUOT, "EDQUOT", Trouble::Full),
    (libc::EMFILE, "EMFILE", Trouble::Short),
    (libc::ENFILE, "ENFILE", Trouble::Short),
    (libc::ENOMEM, "ENOMEM", Trouble::Short),
    (libc::ENOBUFS, "ENOBUFS", Trouble::Short),
    (libc::EAGAIN, "EAGAIN", Trouble::Again),
    (libc::EINTR, "EINTR", Trouble::Again),
    (libc::EBUSY, "EBUSY", Trouble::Again),
    (libc::EROFS, "EROFS", Trouble::ReadOnly),
    (libc::EPERM, "EPERM", Trouble::ReadOnly),
    (libc::EACCES, "EACCES", Trouble::ReadOnly),
    (libc::ENODEV, "ENODEV", Trouble::Gone),
    (libc::ENXIO, "ENXIO", Trouble::Gone),
    (libc::ENOMEDIUM, "ENOMEDIUM", Trouble::Gone),
    (libc::ENOLINK, "ENOLINK", Trouble::Gone),
    (libc::ENOTCONN, "ENOTCONN", Trouble::Gone),
    (libc::ESHUTDOWN, "ESHUTDOWN", Trouble::Gone),
    (libc::ESTALE, "ESTALE", Trouble::Gone),
    (libc::EHOSTDOWN, "EHOSTDOWN", Trouble::Gone),
    (libc::EIO, "EIO", Trouble::Failed),
    (libc::EREMOTEIO, "EREMOTEIO", Trouble::Failed),
    (libc::ETIMEDOUT, "ETIMEDOUT", Trouble::Failed),
    (libc::ETIME, "ETIME", Trouble::Failed),
    (libc::ENODATA, "ENODATA", Trouble::Failed),
    (libc::EILSEQ, "EILSEQ", Trouble::Failed),
    (libc::EBADMSG, "EBADMSG", Trouble::Failed),
    (libc::EUCLEAN, "EUCLEAN", Trouble::Failed),
    (libc::EBADE, "EBADE", Trouble::Failed),
    (libc::ECANCELED, "ECANCELED", Trouble::Failed),
    (libc::EOPNOTSUPP, "EOPNOTSUPP", Trouble::Unsupported),
    (libc::ENOSYS, "ENOSYS", Trouble::Unsupported),
    (libc::EINVAL, "EINVAL", Trouble::Misused),
    (libc::EFBIG, "EFBIG", Trouble::Misused),
    (libc::EOVERFLOW, "EOVERFLOW", Trouble::Misused),
    (libc::EFAULT, "EFAULT", Trouble::Misused),
    (libc::EBADF, "EBADF", Trouble::Misused),
];

impl Trouble {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 8] = [
        Self::Full,
        Self::Short,
        Self::Again,
        Self::ReadOnly,
        Self::Gone,
        Self::Failed,
        Self::Unsupported,
        Self::Misused,
    ];

    /// What an error means.
    #[must_use]
    pub fn of(error: &io::Error) -> Self {
        let number = error.raw_os_error();
        TROUBLES.iter().find(|(known, ..)| Some(*known) == number).map_or(Self::Failed, |(.., trouble)| *trouble)
    }

    /// Trying the same again later may do, and nothing is lost by it.
    #[must_use]
    pub fn passes(self) -> bool {
        match self {
            Self::Full | Self::Short | Self::Again => true,
            Self::ReadOnly | Self::Gone | Self::Failed | Self::Unsupported | Self::Misused => false,
        }
    }
}

/// The number that a guest gets for its backing device's error: the device's own where a guest knows what it means, else `EIO`. What a
/// file system below may say and a disk may not is translated, so that a guest takes it for neither "try again" nor "not supported" (which a
/// file system may take to mean that it needs no flushes).
#[must_use]
pub fn guest_errno(error: &io::Error) -> Errno {
    let own = error.raw_os_error().unwrap_or(libc::EIO);
    Errno(match Trouble::of(error) {
        Trouble::Full => libc::ENOSPC,
        Trouble::ReadOnly => libc::EROFS,
        // What the block layer has a number for.
        Trouble::Failed
            if [libc::EREMOTEIO, libc::ETIMEDOUT, libc::ENODATA, libc::EILSEQ, libc::EBADE].contains(&own) =>
        {
            own
        }
        Trouble::Gone if [libc::ENODEV, libc::ENOLINK].contains(&own) => own,
        Trouble::Misused if own == libc::EINVAL => own,
        Trouble::Short | Trouble::Again | Trouble::Gone | Trouble::Failed | Trouble::Unsupported | Trouble::Misused => {
            libc::EIO
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Goal: each number stands in the table once, under the name that the system has for it; one that is not there is a failed device.
    #[test]
    fn the_table_is_whole() {
        for (at, (number, name, trouble)) in TROUBLES.iter().enumerate() {
            assert!(!TROUBLES[..at].iter().any(|(earlier, ..)| earlier == number), "{name} stands there twice");
            assert_eq!(format!("{:?}", nix::errno::Errno::from_raw(*number)), *name);
            assert_eq!(Trouble::of(&io::Error::from_raw_os_error(*number)), *trouble, "{name}");
            assert!(Trouble::ALL.contains(trouble));
        }
        assert_eq!(Trouble::of(&io::Error::from_raw_os_error(4711)), Trouble::Failed);
        assert_eq!(Trouble::of(&io::ErrorKind::UnexpectedEof.into()), Trouble::Failed);
    }

    /// Goal: a guest never hears of a disk that it should try again, or that the disk does not know flushes; what a disk can say
    /// comes through. Method: every number there is.
    #[test]
    fn guests_hear_what_a_disk_can_say() {
        const SAYS: [i32; 10] = [
            libc::EIO,
            libc::ENOSPC,
            libc::EROFS,
            libc::EREMOTEIO,
            libc::ETIMEDOUT,
            libc::ENODATA,
            libc::EILSEQ,
            libc::EBADE,
            libc::ENODEV,
            libc::ENOLINK,
        ];
        for number in 1..200 {
            let heard = guest_errno(&io::Error::from_raw_os_error(number)).0;
            assert!(SAYS.contains(&heard) || heard == libc::EINVAL, "{number} becomes {heard}");
        }
        for number in SAYS {
            assert_eq!(guest_errno(&io::Error::from_raw_os_error(number)).0, number);
        }
        assert_eq!(guest_errno(&io::ErrorKind::UnexpectedEof.into()).0, libc::EIO);
    }
}
