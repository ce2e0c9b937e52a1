//! Counts tests from the output of `cargo test` and `cargo nextest`.

/// Tests that passed, failed and were skipped.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    pub(crate) fn ran(&self) -> u64 {
        self.passed + self.failed
    }
}

/// Reads a test run's output line by line.
#[derive(Debug, Default)]
pub(crate) struct Counter {
    pub(crate) tally: Tally,
    /// `test name: reason` of each test that libtest reported as ignored.
    pub(crate) ignored: Vec<String>,
}

impl Counter {
    /// Takes one line of output, with or without terminal colours.
    pub(crate) fn line(&mut self, line: &str) {
        let line = strip_colours(line);
        let line = line.trim();
        if let Some(rest) = line.strip_prefix("test result: ") {
            // libtest: `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 9 filtered out; finished in 0.00s`
            let counts = rest.split_once(". ").map_or(rest, |(_, counts)| counts);
            self.tally.add(&pairs(counts.split(';')));
        } else if let Some((head, rest)) = line.split_once(']').filter(|_| line.starts_with("Summary [")) {
            // nextest: `Summary [   0.021s] 4 tests run: 3 passed (1 slow), 1 failed, 2 skipped`
            debug_assert!(head.ends_with('s'), "a duration stands in the brackets: {head}");
            if let Some((_, counts)) = rest.split_once("run:") {
                self.tally.add(&pairs(counts.split(',')));
            }
        } else if let Some((name, reason)) = line.strip_prefix("test ").and_then(|l| l.split_once(" ... ignored")) {
            self.ignored.push(format!("{name}: {}", reason.trim_start_matches([',', ' '])));
        }
    }
}

/// Adds up pieces such as `3 passed (1 slow)`. A test that timed out or could not be executed failed.
fn pairs<'a>(pieces: impl Iterator<Item = &'a str>) -> Tally {
    let mut tally = Tally::default();
    for piece in pieces {
        let mut words = piece.split_whitespace();
        let (Some(Ok(count)), Some(word)) = (words.next().map(str::parse::<u64>), words.next()) else { continue };
        match word {
            "passed" => tally.passed += count,
            "failed" | "timed" | "exec" => tally.failed += count,
            "ignored" | "skipped" => tally.skipped += count,
            _ => {}
        }
    }
    tally
}

/// Drops the escape sequences that cargo colours its output with.
fn strip_colours(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c != '\u{1b}' {
            out.push(c);
        } else if chars.next() == Some('[') {
            chars.by_ref().find(char::is_ascii_alphabetic);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(lines: &[&str], passed: u64, failed: u64, skipped: u64) {
        let mut counter = Counter::default();
        for line in lines {
            counter.line(line);
        }
        assert_eq!(counter.tally, Tally { passed, failed, skipped }, "{lines:?}");
    }

    #[test]
    fn libtest_results_add_up_and_filtered_tests_do_not_count() {
        check(
            &[
                "running 4 tests",
                "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.00s",
                "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
            ],
            4,
            2,
            1,
        );
    }

    #[test]
    fn nextest_summaries_in_all_forms() {
        check(&["     Summary [   0.005s] 3 tests run: 3 passed, 0 skipped"], 3, 0, 0);
        check(&["     Summary [  61.210s] 9 tests run: 6 passed (2 slow), 2 failed, 1 timed out, 4 skipped"], 6, 3, 4);
        check(&["     Summary [   1.000s] 3/9 tests run: 1 passed, 1 failed, 1 exec failed, 0 skipped"], 1, 2, 0);
        check(
            &[
                "\u{1b}[32;1m     Summary\u{1b}[0m [   0.005s] \u{1b}[1m1\u{1b}[0m test run: \u{1b}[1m1\u{1b}[0m passed, 0 skipped",
            ],
            1,
            0,
            0,
        );
    }

    #[test]
    fn other_output_counts_nothing() {
        check(&["3 passed, 2 failed", "Summary of the day: 3 passed", "error: test failed", ""], 0, 0, 0);
    }

    #[test]
    fn an_ignored_test_keeps_its_reason() {
        let mut counter = Counter::default();
        counter.line("test it::soak::a_week ... ignored, takes an hour");
        counter.line("test it::soak::quick ... ok");
        assert_eq!(counter.ignored, ["it::soak::a_week: takes an hour"]);
    }
}
