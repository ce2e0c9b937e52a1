//! For `docs/errno.md`: what becomes of an error of a protected volume's backing device. None of it depends on the number, which
//! only says what the guest hears ([`farshore_uring::guest_errno`]): a device that fails once is not stopped by us, and what it was given
//! is unknown whatever it says.

/// Operation, what the guest gets, what it does to protection, who tries again, alarm.
pub const BACKING_ERRORS: [[&str; 5]; 6] = [
    [
        "guest's read",
        "the error",
        "none: nothing changed",
        "the guest; `EINTR` and `EAGAIN` are tried again at once, 100 times",
        "none: counted (`errors` in `status`)",
    ],
    [
        "guest's write, discard, zeroes",
        "the error",
        "the range is marked missing and an event opens before the guest hears of it: no new points until sync has read what is there now",
        "the guest; as above",
        "`volume.write-failed`",
    ],
    [
        "guest's flush or FUA",
        "the error",
        "points go on and have what the device may have lost; after a crash of the host everything is compared (`activity-log.uncovered`)",
        "the guest; never by us: a second flush that ends well says nothing of the first",
        "`volume.write-failed`",
    ],
    [
        "flush for the activity log",
        "the error, at its next flush",
        "as a guest's flush; the extents stay active",
        "the next guest's flush, or ours when it is needed",
        "`volume.write-failed` then",
    ],
    [
        "sync's read",
        "nothing",
        "read again by 4 KiB; what cannot be read is a range of unknown content in the points; sync still ends",
        "sync, whenever the range is written or compared again",
        "`volume.unreadable`; `source.unreadable` at the target",
    ],
    [
        "verify's read",
        "nothing",
        "the slot counts as not compared: the pass does not move `verified since`",
        "the next pass",
        "`volume.unreadable`",
    ],
];
