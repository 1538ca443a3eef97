//! The random numbers.

use std::collections::HashSet;

use selective_scan::sampling::random::{philox4x32_10, uniform};

/// The vectors that come with Random123, the library of the generator's authors (`kat_vectors`).
#[test]
fn published_vectors() {
    let vectors = [
        ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
        ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
        (
            [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
            [0xa409_3822, 0x299f_31d0],
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
        ),
    ];
    for (counter, key, words) in vectors {
        assert_eq!(philox4x32_10(counter, key), words);
    }
    assert_eq!(uniform(0, 0), 0xe169_c58d_6627_e8d5);
}

/// All bits of a seed and of a position matter.
#[test]
fn every_bit_makes_another_number() {
    let numbers: HashSet<u64> = (0..64).flat_map(|bit| [uniform(1 << bit, 0), uniform(0, 1 << bit)]).collect();
    assert_eq!(numbers.len(), 128);
}
