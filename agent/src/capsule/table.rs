//! What is known by a number that is never used twice, at a cost that does not grow with how much there is.
//!
//! A number has a place in its lower half and how often that was used before in its upper half. So finding is
//! looking at one place, and what comes is put where something has gone: into memory that is still at hand.

/// How many bits of a number are the place.
const PLACE_BITS: u32 = 32;

/// Things by their numbers.
#[derive(Debug)]
pub struct Table<T> {
    places: Vec<Place<T>>,
    /// Places with nothing in them.
    free: Vec<usize>,
    count: usize,
}

#[derive(Debug)]
struct Place<T> {
    /// Of what is there, or of what comes next.
    key: u64,
    thing: Option<T>,
}

impl<T> Default for Table<T> {
    fn default() -> Table<T> {
        Table { places: Vec::new(), free: Vec::new(), count: 0 }
    }
}

impl<T> Table<T> {
    /// Puts something in, which is made with its number in hand. Returns that.
    pub fn insert(&mut self, make: impl FnOnce(u64) -> T) -> u64 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.places.push(Place { key: self.places.len() as u64, thing: None });
            self.places.len() - 1
        });
        let place = &mut self.places[at];
        place.thing = Some(make(place.key));
        self.count += 1;
        place.key
    }

    /// What has this number, if it is there still.
    pub fn get(&self, key: &u64) -> Option<&T> {
        let place = self.places.get(Self::place_of(*key)?)?;
        place.thing.as_ref().filter(|_| place.key == *key)
    }

    /// As [`Table::get`], to be changed.
    pub fn get_mut(&mut self, key: &u64) -> Option<&mut T> {
        let place = self.places.get_mut(Self::place_of(*key)?)?;
        place.thing.as_mut().filter(|_| place.key == *key)
    }

    /// Takes out what has this number, which nothing will have again.
    pub fn remove(&mut self, key: &u64) -> Option<T> {
        let at = Self::place_of(*key)?;
        let place = self.places.get_mut(at).filter(|place| place.key == *key)?;
        let thing = place.thing.take()?;
        self.count -= 1;
        // After four thousand million uses of one place it is left alone.
        if let Some(next) = place.key.checked_add(1 << PLACE_BITS) {
            place.key = next;
            self.free.push(at);
        }
        Some(thing)
    }

    /// Everything, in no order that means anything.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.places.iter().filter_map(|place| place.thing.as_ref())
    }

    /// As [`Table::values`], to be changed.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.places.iter_mut().filter_map(|place| place.thing.as_mut())
    }

    /// The numbers of everything, in the order of [`Table::values`].
    pub fn keys(&self) -> impl Iterator<Item = &u64> {
        self.places.iter().filter(|place| place.thing.is_some()).map(|place| &place.key)
    }

    /// How much there is.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    fn place_of(key: u64) -> Option<usize> {
        usize::try_from(key & ((1 << PLACE_BITS) - 1)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_never_used_twice_and_a_place_is() {
        let mut table = Table::default();
        let keys: Vec<u64> = (0..3).map(|number| table.insert(|key| (number, key))).collect();
        assert_eq!(keys, [0, 1, 2]);
        assert_eq!(table.get(&1), Some(&(1, 1)));
        assert_eq!(table.remove(&1), Some((1, 1)));
        assert!(table.get(&1).is_none() && table.get_mut(&1).is_none() && table.remove(&1).is_none());
        let again = table.insert(|key| (7, key));
        assert_eq!((again, table.places.len()), (1 << 32 | 1, 3));
        assert_eq!((table.get(&1), table.get(&again)), (None, Some(&(7, again))));
        let at_9 = table.get(&9).is_some();
        assert!(!at_9 && table.remove(&(9 << 32)).is_none());
        assert_eq!(table.keys().copied().collect::<Vec<_>>(), [0, again, 2]);
        table.values_mut().for_each(|(number, _)| *number += 1);
        assert_eq!(table.values().map(|(number, _)| *number).collect::<Vec<_>>(), [1, 8, 3]);
        for key in [0, again, 2] {
            assert_eq!(table.len(), table.keys().count());
            assert!(!table.is_empty() && table.remove(&key).is_some());
        }
        assert!(table.is_empty() && table.get(&u64::MAX).is_none());
    }
}
