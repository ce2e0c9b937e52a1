//! What a suite did, and the table at the end.

use std::fmt::Write as _;
use std::time::Duration;

use crate::count::Tally;

/// One suite's result. A gate that is no test (a formatter, a lint run, one rule of tidy) counts as one test.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) suite: &'static str,
    pub(crate) tally: Tally,
    /// Why something failed or was skipped, one line each.
    pub(crate) notes: Vec<String>,
    pub(crate) elapsed: Duration,
}

impl Report {
    pub(crate) fn is_good(&self) -> bool {
        self.tally.failed == 0
    }

    fn word(&self) -> &'static str {
        if self.tally.failed > 0 {
            "FAILED"
        } else if self.tally.passed == 0 {
            "skipped"
        } else {
            "ok"
        }
    }
}

/// Columns of a suite's name.
pub(crate) const NAME_WIDTH: usize = 11;

/// The table of all suites; its last line counts over all of them: `N passed, N failed, N skipped`.
pub(crate) fn summary(reports: &[Report]) -> String {
    let mut out = String::from("\n");
    let mut total = Tally::default();
    let _ = writeln!(
        out,
        "{:<NAME_WIDTH$} {:<8} {:>6} {:>7} {:>7} {:>8} {:>9}",
        "suite", "result", "ran", "passed", "failed", "skipped", "seconds"
    );
    for report in reports {
        let Tally { passed, failed, skipped } = report.tally;
        let _ = writeln!(
            out,
            "{:<NAME_WIDTH$} {:<8} {:>6} {:>7} {:>7} {:>8} {:>9.1}",
            report.suite,
            report.word(),
            passed + failed,
            passed,
            failed,
            skipped,
            report.elapsed.as_secs_f64()
        );
        for note in &report.notes {
            let _ = writeln!(out, "          - {}", note.trim_end().replace('\n', "\n            "));
        }
        total.add(&report.tally);
    }
    let _ = writeln!(out, "\n{} passed, {} failed, {} skipped", total.passed, total.failed, total.skipped);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(suite: &'static str, passed: u64, failed: u64, skipped: u64, note: &str) -> Report {
        let notes = if note.is_empty() { vec![] } else { vec![note.to_owned()] };
        Report { suite, tally: Tally { passed, failed, skipped }, notes, elapsed: Duration::from_millis(1500) }
    }

    #[test]
    fn the_last_line_counts_every_suite_and_a_skip_keeps_its_reason() {
        let text = summary(&[
            report("unit", 40, 0, 1, ""),
            report("it", 3, 2, 0, ""),
            report("miri", 0, 0, 1, "no nightly toolchain has miri"),
        ]);
        assert_eq!(text.lines().last(), Some("43 passed, 2 failed, 2 skipped"));
        assert!(text.contains("no nightly toolchain has miri"));
        let miri = text.lines().find(|l| l.starts_with("miri")).expect("a line per suite");
        assert!(miri.contains("skipped"));
        assert!(text.lines().any(|l| l.starts_with("it ") && l.contains("FAILED")));
    }
}
