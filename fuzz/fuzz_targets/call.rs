#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| otpgate::fuzzing::call(data));
