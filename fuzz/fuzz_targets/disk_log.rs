#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| farshore_tests::fuzz::targets::disk_log(bytes));
