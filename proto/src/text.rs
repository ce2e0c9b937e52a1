//! Sizes, durations and times as people write them: on the command line and in configuration files.

use std::time::Duration;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::{Error, Result, WallTime};

fn malformed(what: &'static str, text: &str, form: &str) -> Error {
    Error::Malformed { what, reason: format!("{text:?} is not {form}") }
}

/// Splits `12.5GiB` into number and unit.
fn split_unit(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    (number.is_finite() && number >= 0.0).then_some((number, text[end..].trim()))
}

/// Bytes from `4GiB`, `500MB`, `1.5TiB` or `4096`. Binary units end in `iB`, decimal ones in `B`; a bare `K`, `M`, `G`,
/// `T` is binary, as in fio and qemu.
///
/// # Errors
/// [`Error::Malformed`] showing the accepted forms.
pub fn parse_size(text: &str) -> Result<u64> {
    const FORM: &str = "a size such as 4GiB, 500MB or 4096";
    let (number, unit) = split_unit(text).ok_or_else(|| malformed("size", text, FORM))?;
    let power = |letter: char| "KMGTP".find(letter).map(|at| i32::try_from(at).unwrap_or(0) + 1);
    let mut letters = unit.chars();
    let factor = match (letters.next().map(|c| c.to_ascii_uppercase()), letters.as_str()) {
        (None | Some('B'), "") => Some(1.0),
        (Some(letter), "iB" | "ib" | "") => power(letter).map(|p| 1024f64.powi(p)),
        (Some(letter), "B" | "b") => power(letter).map(|p| 1000f64.powi(p)),
        _ => None,
    };
    let bytes = number * factor.ok_or_else(|| malformed("size", text, FORM))?;
    if bytes >= 9.0e18 || (bytes.fract() != 0.0 && bytes < 1.0) {
        return Err(malformed("size", text, FORM));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to lie between 0 and 9e18")]
    Ok(bytes.round() as u64)
}

/// A size with the largest binary unit that leaves one or more: `1.5 GiB`.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    #[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A duration from `20ms`, `1s`, `1.5h`, `2d`, `250us`; a bare number is seconds.
///
/// # Errors
/// [`Error::Malformed`] showing the accepted forms.
pub fn parse_duration(text: &str) -> Result<Duration> {
    const FORM: &str = "a duration such as 20ms, 1s, 5m, 2h or 30d";
    let (number, unit) = split_unit(text).ok_or_else(|| malformed("duration", text, FORM))?;
    let seconds = match unit {
        "us" | "µs" => number / 1e6,
        "ms" => number / 1e3,
        "" | "s" => number,
        "m" | "min" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 86400.0,
        _ => return Err(malformed("duration", text, FORM)),
    };
    Duration::try_from_secs_f64(seconds).map_err(|_| malformed("duration", text, FORM))
}

/// RFC 3339 in UTC with microseconds: `2026-11-22T21:49:05.123456Z`.
#[must_use]
pub fn show_time(time: WallTime) -> String {
    let time = OffsetDateTime::from_unix_timestamp_nanos(i128::from(time.0)).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let (date, clock) = (time.date(), time.time());
    format!("{date}T{:02}:{:02}:{:02}.{:06}Z", clock.hour(), clock.minute(), clock.second(), clock.microsecond())
}

/// The last moment that [`show_time`] shows as it shows `time`: whoever gives back what was shown means all of its microsecond.
#[must_use]
pub fn last_shown_as(time: WallTime) -> WallTime {
    const MICROSECOND: u64 = 1000;
    WallTime(time.0.saturating_add(MICROSECOND - 1 - time.0 % MICROSECOND))
}

/// A time from RFC 3339 (`2026-11-22T21:49:05.5Z`, `2026-11-22T23:49:05+02:00`).
///
/// # Errors
/// [`Error::Malformed`] showing the accepted form.
pub fn parse_time(text: &str) -> Result<WallTime> {
    OffsetDateTime::parse(text.trim(), &Rfc3339)
        .ok()
        .and_then(|time| u64::try_from(time.unix_timestamp_nanos()).ok())
        .map(WallTime)
        .ok_or_else(|| malformed("time", text, "an RFC 3339 time such as 2026-11-22T21:49:05Z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("4096", 4096),
            ("4GiB", 4 << 30),
            ("500MB", 500_000_000),
            ("1.5K", 1536),
            ("2T", 2 << 40),
            ("10 MiB", 10 << 20),
            ("7B", 7),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "GiB", "-1", "4GiBs", "1e99T", "four", "nan"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(
            (show_size(0), show_size(1536), show_size(3 << 40)),
            ("0 B".into(), "1.5 KiB".into(), "3.0 TiB".into())
        );
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parse_duration("1.5h"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("3"), Ok(Duration::from_secs(3)));
        for bad in ["", "ms", "5y", "-1s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times_print_and_parse() {
        for (text, seconds, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2000-02-29T12:30:15.5Z", 951_827_415, 500_000_000),
            ("2026-11-22T23:49:05+02:00", 1_795_384_145, 0),
            ("2100-03-01T00:00:00.000000001Z", 4_107_542_400, 1),
        ] {
            assert_eq!(parse_time(text), Ok(WallTime(seconds * 1_000_000_000 + nanos)), "{text}");
        }
        for bad in
            ["", "2026-02-29T00:00:00Z", "2026-13-01T00:00:00Z", "2026-01-01T00:00:00", "2026-01-01T00:00:00+1:00"]
        {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
        for day in (0..60_000u64).step_by(7) {
            let time = WallTime((day * 86_400 + day) * 1_000_000_000 + 123_456_000);
            assert_eq!(parse_time(&show_time(time)), Ok(time));
            let (exact, next) = (WallTime(time.0 + day % 1000), WallTime(time.0 + 1000));
            let given_back = parse_time(&show_time(exact)).map(last_shown_as).expect("just shown");
            assert!(given_back >= exact && given_back < next && show_time(given_back) == show_time(exact));
        }
        assert_eq!(last_shown_as(WallTime(u64::MAX)), WallTime(u64::MAX));
    }
}
