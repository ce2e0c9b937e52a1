//! Bitmaps against a set of bit numbers.

use std::collections::BTreeSet;

use farshore_ring::{Bitmap, Error, Memory, Ring, SLOT_BYTES, Which};
use proptest::prelude::*;

use crate::support::{config, folder, identity};

#[derive(Clone, Debug)]
enum Op {
    Set(u64, u64),
    Clear(u64, u64),
    Swap(usize, u64),
    MoveTo,
    MoveBack,
}

/// Not a multiple of anything: the last slot is partial.
const CAPACITY: u64 = 300 * SLOT_BYTES + 5000;
const BITS: u64 = 301;

fn op() -> impl Strategy<Value = Op> {
    let range = || (0..CAPACITY, 0..40 * SLOT_BYTES).prop_map(|(offset, len)| (offset, len.min(CAPACITY - offset)));
    prop_oneof![
        4 => range().prop_map(|(o, l)| Op::Set(o, l)),
        3 => range().prop_map(|(o, l)| Op::Clear(o, l)),
        1 => Just(Op::Clear(290 * SLOT_BYTES, CAPACITY - 290 * SLOT_BYTES)),
        1 => (0..4_usize, any::<u64>()).prop_map(|(word, value)| Op::Swap(word, value)),
        1 => Just(Op::MoveTo),
        1 => Just(Op::MoveBack),
    ]
}

fn check(bitmap: &Bitmap, model: &BTreeSet<u64>) {
    assert_eq!(bitmap.count_ones(), model.len() as u64);
    let mut found = BTreeSet::new();
    let mut from = 0;
    while let Some(bit) = bitmap.next_set(from) {
        found.insert(bit);
        from = bit + 1;
    }
    assert_eq!(&found, model);
    (0..BITS).for_each(|bit| assert_eq!(bitmap.test(bit), model.contains(&bit), "bit {bit}"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_set(ops in prop::collection::vec(op(), 1..40)) {
        let ring = Ring::create_in_memory(&Memory::new(), &config(1, 8)).expect("created");
        ring.add_volume(3, [9; 16], CAPACITY).expect("added");
        let missing = ring.bitmap(3, Which::Missing).expect("added");
        let in_flight = ring.bitmap(3, Which::InFlight).expect("added");
        let (mut model, mut flying) = (BTreeSet::new(), BTreeSet::new());
        for op in ops {
            match op {
                Op::Set(offset, len) => {
                    missing.set_range(offset, len);
                    model.extend((0..BITS).filter(|b| len > 0 && b * SLOT_BYTES < offset + len && (b + 1) * SLOT_BYTES > offset));
                }
                Op::Clear(offset, len) => {
                    missing.clear_range(offset, len);
                    model.retain(|b| b * SLOT_BYTES < offset || ((b + 1) * SLOT_BYTES).min(CAPACITY) > offset + len);
                }
                Op::Swap(word, value) => {
                    let before = missing.swap_word(word, value);
                    (0..64).for_each(|i| {
                        let bit = word as u64 * 64 + i;
                        assert_eq!(before & (1 << i) != 0, model.remove(&bit), "bit {bit}");
                        if value & (1 << i) != 0 {
                            model.insert(bit);
                        }
                    });
                }
                Op::MoveTo => {
                    if let Some(bit) = missing.next_set(0) {
                        let word = usize::try_from(bit / 64).expect("small");
                        assert_eq!(missing.move_word_to(&in_flight, word, 1 << (bit % 64)), 1 << (bit % 64));
                        flying.insert(bit);
                        model.remove(&bit);
                    }
                }
                Op::MoveBack => {
                    in_flight.move_all_to(&missing);
                    model.append(&mut flying);
                }
            }
            check(&missing, &model);
            check(&in_flight, &flying);
            assert_eq!(missing.test_range(0, CAPACITY), !model.is_empty());
        }
    }
}

/// Goal: 64 TiB cost little memory and no time; bits far apart are found.
#[test]
fn huge_bitmaps_are_sparse() {
    let folder = folder();
    let path = folder.path().join("ring");
    let ring = Ring::create(&path, &config(1, 8)).expect("created");
    let capacity = 64 << 40;
    ring.add_volume(0, [1; 16], capacity).expect("added");
    let bitmap = ring.bitmap(0, Which::Unacked).expect("added");
    assert_eq!(bitmap.bits(), 1 << 30);
    let bits = [5, (1 << 29) + 77, (1 << 30) - 1];
    bits.iter().for_each(|bit| assert!(bitmap.set(*bit)));
    let mut found = vec![];
    bitmap.for_each_word(|word, bits| found.push(word as u64 * 64 + u64::from(bits.trailing_zeros())));
    assert_eq!(found, bits);
    assert_eq!((bitmap.count_ones(), bitmap.next_set(6), bitmap.next_set(bits[2] + 1)), (3, Some(bits[1]), None));
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&path).expect("exists"));
    assert!(blocks * 512 < 4 << 20, "{blocks} sectors allocated for three bits");
}

/// Goal: volumes and their bits are there after a re-open; indexes are guarded; a removed one's space comes back empty.
#[test]
fn volumes_survive_and_are_replaced() {
    let folder = folder();
    let path = folder.path().join("ring");
    let ring = Ring::create(&path, &config(1, 8)).expect("created");
    for volume in 0..16_u16 {
        ring.add_volume(volume, [volume.to_le_bytes()[0]; 16], 10 * SLOT_BYTES + u64::from(volume)).expect("added");
        ring.bitmap(volume, Which::Missing).expect("added").set(u64::from(volume) % 10);
    }
    assert!(matches!(ring.add_volume(16, [0; 16], 1), Err(Error::Volume { volume: 16, .. })));
    assert!(matches!(ring.add_volume(3, [0; 16], 1), Err(Error::Volume { volume: 3, .. })));
    ring.add_volume(3, [3; 16], 10 * SLOT_BYTES + 3).expect("the same again is nothing");
    ring.remove_volume(5).expect("there");
    assert!(ring.remove_volume(5).is_err() && ring.bitmap(5, Which::Missing).is_none());
    drop(ring);
    let dormant = Ring::open(&path, &identity()).expect("opens");
    assert_eq!(dormant.volumes().len(), 15);
    for info in dormant.volumes() {
        let bitmap = dormant.bitmap(info.volume, Which::Missing).expect("listed");
        assert_eq!(
            (info.id[0], bitmap.next_set(0), bitmap.count_ones()),
            (info.volume.to_le_bytes()[0], Some(u64::from(info.volume) % 10), 1)
        );
    }
    let ring = dormant.resume();
    let length = std::fs::metadata(&path).expect("exists").len();
    ring.add_volume(5, [55; 16], 20 * SLOT_BYTES).expect("added");
    assert_eq!(std::fs::metadata(&path).expect("exists").len(), length, "its old place is taken");
    assert_eq!(ring.bitmap(5, Which::Missing).expect("added").count_ones(), 0);
}
