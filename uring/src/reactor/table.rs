//! A slab whose keys carry a generation, so that a late cancel never hits the next operation in the same place.

/// Key of an entry: the index in the low half, the generation in the upper.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Key(u64);

/// Generations wrap at this; leaves the top bits of a key to the caller.
const GENERATIONS: u32 = 1 << 28;

impl Key {
    /// Bits that a key never uses.
    pub(super) const FREE_BITS: u32 = 4;

    pub(super) fn raw(self) -> u64 {
        self.0
    }

    pub(super) fn from_raw(raw: u64) -> Self {
        Self(raw)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the low half is the index")]
    fn index(self) -> usize {
        self.0 as u32 as usize
    }
}

pub(super) struct Table<T> {
    entries: Vec<Entry<T>>,
    free: Vec<u32>,
    len: usize,
}

struct Entry<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Table<T> {
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self { entries: Vec::with_capacity(capacity), free: Vec::with_capacity(capacity), len: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn insert(&mut self, value: T) -> Key {
        self.len += 1;
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry { generation: 0, value: None });
            u32::try_from(self.entries.len() - 1).expect("memory ends long before 2^32 operations")
        });
        let entry = &mut self.entries[index as usize];
        entry.value = Some(value);
        Key(u64::from(entry.generation) << 32 | u64::from(index))
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let entry = self.entries.get_mut(key.index())?;
        if u64::from(entry.generation) == key.0 >> 32 { entry.value.as_mut() } else { None }
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<T> {
        self.get_mut(key)?;
        let index = u32::try_from(key.index()).expect("an index is made from 32 bits");
        let entry = &mut self.entries[key.index()];
        entry.generation = (entry.generation + 1) % GENERATIONS;
        self.free.push(index);
        self.len -= 1;
        entry.value.take()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (Key, &mut T)> {
        self.entries.iter_mut().enumerate().filter_map(|(index, entry)| {
            let key = Key(u64::from(entry.generation) << 32 | index as u64);
            entry.value.as_mut().map(|value| (key, value))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_dies_with_its_entry() {
        let mut table = Table::with_capacity(2);
        let first = table.insert('a');
        assert_eq!(table.remove(first), Some('a'));
        let second = table.insert('b');
        assert_ne!(first, second);
        assert_eq!(table.get_mut(first), None);
        assert_eq!(table.remove(first), None);
        assert_eq!(table.get_mut(second), Some(&mut 'b'));
        assert_eq!(table.len(), 1);
        assert_eq!(second.raw() >> (64 - Key::FREE_BITS), 0);
        assert_eq!(table.iter_mut().map(|(key, value)| (key, *value)).collect::<Vec<_>>(), [(second, 'b')]);
    }
}
