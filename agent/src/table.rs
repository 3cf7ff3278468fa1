//! Names and what they stand for, where making and deleting take time.
//!
//! ```text
//!   free ──reserve──► reserved ──fill──► filled ──take──► reserved ──drop──► free
//!    ▲                    │ drop                              │ fill
//!    └────────────────────┘                                   └──► filled
//! ```
//!
//! A name is reserved while its thing is made or deleted, so two requests for one name never meet, and no lock is held
//! while anything slow happens.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The table. A name maps to None while it is reserved.
#[derive(Debug)]
pub struct Table<K: Eq + Hash, V>(Mutex<HashMap<K, Option<Arc<V>>>>);

impl<K: Eq + Hash, V> Default for Table<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash + Clone, V> Table<K, V> {
    /// Keeps a free name for something that is about to be made; None when it is not free.
    pub fn reserve(&self, key: &K) -> Option<Reservation<'_, K, V>> {
        let mut names = self.lock();
        if names.contains_key(key) {
            return None;
        }
        names.insert(key.clone(), None);
        Some(Reservation {
            table: self,
            key: key.clone(),
        })
    }

    /// What has this name now.
    pub fn get(&self, key: &K) -> Option<Arc<V>> {
        self.lock().get(key).cloned().flatten()
    }

    /// Takes out what has this name and keeps the name, which is free when the reservation is dropped.
    pub fn take(&self, key: &K) -> Option<(Arc<V>, Reservation<'_, K, V>)> {
        let value = self.lock().get_mut(key)?.take()?;
        Some((
            value,
            Reservation {
                table: self,
                key: key.clone(),
            },
        ))
    }

    /// All there is now.
    pub fn all(&self) -> Vec<(K, Arc<V>)> {
        let names = self.lock();
        names
            .iter()
            .filter_map(|(key, value)| Some((key.clone(), value.clone()?)))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<K, Option<Arc<V>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name that is nobody else's meanwhile. Dropping it frees the name.
#[derive(Debug)]
pub struct Reservation<'a, K: Eq + Hash, V> {
    table: &'a Table<K, V>,
    key: K,
}

impl<K: Eq + Hash + Clone, V> Reservation<'_, K, V> {
    /// Gives the name its thing.
    pub fn fill(self, value: Arc<V>) {
        self.table.lock().insert(self.key.clone(), Some(value));
    }
}

impl<K: Eq + Hash, V> Drop for Reservation<'_, K, V> {
    fn drop(&mut self) {
        let mut names = self.table.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A filled name stays.
        if names.get(&self.key).is_some_and(Option::is_none) {
            names.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_given_once() {
        let table = Table::<&str, u8>::default();
        let reservation = table.reserve(&"a").unwrap();
        assert!(table.reserve(&"a").is_none() && table.get(&"a").is_none());
        reservation.fill(Arc::new(1));
        assert!(table.reserve(&"a").is_none());
        assert_eq!(table.get(&"a").as_deref(), Some(&1));
    }

    #[test]
    fn a_name_whose_thing_was_not_made_is_free_again() {
        let table = Table::<&str, u8>::default();
        drop(table.reserve(&"a"));
        assert!(table.reserve(&"a").is_some());
    }

    #[test]
    fn deleting_happens_once_and_may_fail() {
        let table = Table::<&str, u8>::default();
        table.reserve(&"a").unwrap().fill(Arc::new(1));
        let (value, reservation) = table.take(&"a").unwrap();
        assert!(table.take(&"a").is_none() && table.reserve(&"a").is_none());
        reservation.fill(value);
        assert_eq!(table.all(), [("a", Arc::new(1))]);
        drop(table.take(&"a"));
        assert!(table.reserve(&"a").is_some());
    }
}
