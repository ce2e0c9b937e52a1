//! fstab, crypttab and systemd's names for what stands in them.

use std::path::{Path, PathBuf};

/// A file system that is mounted at boot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Entry {
    /// A path, or `UUID=…`, `LABEL=…`, `PARTUUID=…`, `PARTLABEL=…`.
    pub(super) device: String,
    /// Where it is mounted.
    pub(super) point: PathBuf,
    /// The unit that mounts it.
    pub(super) unit: String,
}

/// The mounts of a table as in fstab(5); swap and lines that do not parse are left out.
pub(super) fn fstab(text: &str) -> Vec<Entry> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    let mut entries = Vec::new();
    for line in lines {
        let mut fields = line.split_whitespace();
        let (Some(device), Some(point), Some(kind)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let point = PathBuf::from(unescaped(point));
        if kind != "swap" && point.is_absolute() {
            let unit = format!("{}.mount", escaped_path(&point));
            entries.push(Entry { device: unescaped(device), point, unit });
        }
    }
    entries
}

/// The mount that a unit file describes, called `unit`.
pub(super) fn mount_unit(unit: &str, text: &str) -> Option<Entry> {
    let value = |key: &str| {
        let lines = text.lines().filter_map(|line| line.trim().split_once('='));
        lines.filter(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned()).next_back()
    };
    Some(Entry { device: value("What")?, point: value("Where")?.into(), unit: unit.to_owned() })
}

/// Name and device of each line of a table as in crypttab(5).
pub(super) fn crypttab(text: &str) -> Vec<(String, String)> {
    let lines = text.lines().map(str::trim).filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            Some((fields.next()?.to_owned(), fields.next()?.to_owned()))
        })
        .collect()
}

/// The node to which a device of fstab leads, as systemd names it; none: it is no device.
pub(super) fn node(device: &str) -> Option<String> {
    let tags =
        [("UUID=", "by-uuid"), ("LABEL=", "by-label"), ("PARTUUID=", "by-partuuid"), ("PARTLABEL=", "by-partlabel")];
    for (tag, folder) in tags {
        if let Some(value) = device.strip_prefix(tag) {
            let value = value.trim_matches('"');
            return Some(format!("/dev/disk/{folder}/{}", encoded(value)));
        }
    }
    device.starts_with("/dev/").then(|| device.to_owned())
}

/// Both names of a logical volume, where `path` is one of them: `/dev/VG/LV` and `/dev/mapper/VG-LV`.
pub(super) fn twin(path: &str) -> Option<String> {
    if let Some(name) = path.strip_prefix("/dev/mapper/") {
        // A single hyphen stands between the two, a double one for one in either.
        let at = name.match_indices('-').map(|(at, _)| at).find(|&at| {
            let bytes = name.as_bytes();
            let run = bytes[..at].iter().rev().take_while(|&&byte| byte == b'-').count()
                + bytes[at..].iter().take_while(|&&byte| byte == b'-').count();
            run == 1
        })?;
        let (group, volume) = (name[..at].replace("--", "-"), name[at + 1..].replace("--", "-"));
        return Some(format!("/dev/{group}/{volume}"));
    }
    let (group, volume) = path.strip_prefix("/dev/")?.split_once('/')?;
    let is_group = !matches!(group, "disk" | "mapper" | "block" | "md" | "shm" | "loop" | "bsg" | "char");
    let plain = is_group && !volume.is_empty() && !volume.contains('/');
    plain.then(|| format!("/dev/mapper/{}-{}", group.replace('-', "--"), volume.replace('-', "--")))
}

/// As udev writes labels into names of links.
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) || !c.is_ascii() {
            out.push(c);
        } else {
            out.push_str(&format!("\\x{:02x}", u32::from(c)));
        }
    }
    out
}

/// A path as the name of a unit (systemd-escape --path).
pub(super) fn escaped_path(path: &Path) -> String {
    let text = path.to_string_lossy();
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() { "-".to_owned() } else { escaped(&parts.join("/")) }
}

/// A text as part of a unit's name (systemd-escape).
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'/' => out.push('-'),
            b'.' if at == 0 => out.push_str("\\x2e"),
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b':' | b'_' | b'.' => out.push(char::from(byte)),
            _ => out.push_str(&format!("\\x{byte:02x}")),
        }
    }
    out
}

/// Without the octal escapes of fstab (`\040` for a blank).
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, more)) = rest.split_first() {
        let octal = more.get(..3).filter(|_| byte == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(value) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            bytes.push(value);
            rest = &more[3..];
        } else {
            bytes.push(byte);
            rest = more;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names as `systemd-escape` gives them.
    #[test]
    fn names_of_units() {
        assert_eq!(escaped_path(Path::new("/")), "-");
        assert_eq!(escaped_path(Path::new("/srv//data/")), "srv-data");
        assert_eq!(escaped_path(Path::new("/dev/mapper/vg-data")), "dev-mapper-vg\\x2ddata");
        assert_eq!(escaped_path(Path::new("/.hidden/a b")), "\\x2ehidden-a\\x20b");
        assert_eq!(escaped("ä"), "\\xc3\\xa4");
    }

    #[test]
    fn lines_of_fstab() {
        let text = "# a comment\n\nUUID=1-2 / ext4 rw 0 1\n/dev/vg/swap none swap sw 0 0\n\
                    /dev/vg/data /srv/a\\040b xfs noatime 0 2\nbroken line\nhost:/x /net nfs ro 0 0\n";
        let found: Vec<_> = fstab(text).into_iter().map(|entry| (entry.device, entry.unit)).collect();
        let expected = [("UUID=1-2", "-.mount"), ("/dev/vg/data", "srv-a\\x20b.mount"), ("host:/x", "net.mount")];
        assert_eq!(found, expected.map(|(device, unit)| (device.to_owned(), unit.to_owned())));
        assert_eq!(crypttab("# c\nhome /dev/vg/home none luks\nbroken\n"), [("home".into(), "/dev/vg/home".into())]);
        let unit = mount_unit("srv.mount", "[Mount]\nWhat = /dev/vg/srv\nWhere=/srv\n").expect("good");
        assert_eq!((unit.device.as_str(), unit.point), ("/dev/vg/srv", PathBuf::from("/srv")));
        assert_eq!(mount_unit("x.mount", "[Mount]\nWhat=/dev/x\n"), None);
    }

    #[test]
    fn devices_lead_to_nodes() {
        assert_eq!(node("UUID=\"ab-1\"").as_deref(), Some("/dev/disk/by-uuid/ab-1"));
        assert_eq!(node("LABEL=my data").as_deref(), Some("/dev/disk/by-label/my\\x20data"));
        assert_eq!(node("/dev/sdb1").as_deref(), Some("/dev/sdb1"));
        assert_eq!((node("tmpfs"), node("host:/x")), (None, None));
    }

    #[test]
    fn a_logical_volume_has_two_names() {
        for (one, other) in [
            ("/dev/vg/data", "/dev/mapper/vg-data"),
            ("/dev/my-vg/my-data", "/dev/mapper/my--vg-my--data"),
            ("/dev/a--b/c", "/dev/mapper/a----b-c"),
        ] {
            assert_eq!((twin(one).as_deref(), twin(other).as_deref()), (Some(other), Some(one)));
        }
        for none in ["/dev/sdb1", "/dev/disk/by-uuid/x", "/dev/mapper/plain", "/dev/mapper/a--b", "/srv/x"] {
            assert_eq!(twin(none), None, "{none}");
        }
    }
}
