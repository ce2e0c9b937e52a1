//! What the host allows this process.

use farshore_proto::text::show_size;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

/// Why a ring of so many bytes is not locked in memory, and what to do: for the alarm.
pub(crate) fn ring_unlocked(ring_bytes: u64) -> String {
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(RLIM_INFINITY, |(soft, _)| soft);
    let ring = show_size(ring_bytes);
    let why = if limit < ring_bytes {
        format!("at most {} may be locked (RLIMIT_MEMLOCK)", show_size(limit))
    } else {
        "the host has no more memory to lock".to_owned()
    };
    format!(
        "the ring ({ring}) is not locked in memory and may be paged out: {why}; raise the limit with LimitMEMLOCK=infinity in the \
         agent's unit, or `ulimit -l unlimited` before it starts, or take a smaller `ring`"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_out_is_named() {
        let text = ring_unlocked(256 << 20);
        for part in ["256.0 MiB", "LimitMEMLOCK", "ulimit -l"] {
            assert!(text.contains(part), "{part} is missing: {text}");
        }
    }
}
