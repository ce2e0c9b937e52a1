//! For `docs/errno.md`: what becomes of an error of the target's disks. [`Kind::of`](crate::error::Kind::of) says which numbers pass by
//! themselves; these rows say what is done with either sort, and where.

/// Place, an error that passes, any other, alarm.
pub const DISK_ERRORS: [[&str; 4]; 9] = [
    [
        "journal: write, new segment, footer",
        "the stream pauses; what was begun is cut back, nothing of it is acknowledged; looked at every second, and goes on by itself",
        "the stream stops until the target is started again",
        "`target.disk_full`, `target.no_resources`; else `journal.sync_failed`",
    ],
    [
        "journal: making durable",
        "as any other: the bytes may be gone, and waiting does not bring them back",
        "the stream stops until the target is started again; never tried twice",
        "`journal.sync_failed`",
    ],
    [
        "catalog, on the way of a batch or a greeting",
        "the stream pauses, as above",
        "the stream stops, as above",
        "as above",
    ],
    [
        "catalog, for a command",
        "the command fails and says why; nothing is changed",
        "the same",
        "none: a person waits for it",
    ],
    [
        "base: retention's writes",
        "tried again every second; history is kept, the disk fills",
        "after a failed sync the base takes no more writes until the target is started again; reads go on, no point is lost",
        "`retention.stopped`",
    ],
    ["index: merges in the background", "tried again every second; reads take longer", "the same", "none: in the log"],
    [
        "journal, index, base: reads for a view or restore",
        "that request fails (`EIO`); nothing is given up",
        "the same; what is unreadable as stored is noted, and points that need it are refused",
        "`journal.damaged`, `journal.entry_damaged` where bytes are wrong",
    ],
    [
        "a view's own writes",
        "`ENOSPC` to whoever uses the view; the view goes on",
        "`EIO`; after a failed sync the view takes no more writes",
        "none: the user hears of it",
    ],
    [
        "opening a stream",
        "tried again when its source greets, ever more rarely",
        "the same",
        "`stream.unavailable`; `base.failed` for a base on a device",
    ],
];
