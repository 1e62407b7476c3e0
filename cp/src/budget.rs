//! A bound on the bytes that many holders may hold together.

use std::cell::Cell;
use std::rc::Rc;

/// The bound. Clones are the same budget.
#[derive(Debug, Clone)]
pub struct Budget {
    used: Rc<Cell<usize>>,
    most: usize,
}

impl Budget {
    /// A budget of `most` bytes.
    pub fn new(most: usize) -> Budget {
        Budget { used: Rc::default(), most }
    }

    /// A share in it, of nothing yet.
    pub fn share(&self) -> Share {
        Share { budget: self.clone(), bytes: 0 }
    }
}

/// What one holder has of a [`Budget`]; given back when it is dropped.
#[derive(Debug)]
pub struct Share {
    budget: Budget,
    bytes: usize,
}

impl Share {
    /// Takes more; false, and nothing taken, when there is less left.
    pub fn grow(&mut self, bytes: usize) -> bool {
        let is_there = bytes <= self.budget.most - self.budget.used.get();
        if is_there {
            self.grow_up_to(bytes);
        }
        is_there
    }

    /// Takes as much as is left, at most `bytes`, and gives how much that was.
    pub fn grow_up_to(&mut self, bytes: usize) -> usize {
        let used = self.budget.used.get();
        let taken = bytes.min(self.budget.most - used);
        self.budget.used.set(used + taken);
        self.bytes += taken;
        taken
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used.set(self.budget.used.get() - self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_taken_from_one_budget_and_come_back() {
        let budget = Budget::new(10);
        let (mut one, mut other) = (budget.share(), budget.clone().share());
        assert!(one.grow(6));
        assert!(!other.grow(5), "only four are left");
        assert_eq!(other.grow_up_to(5), 4);
        assert_eq!(one.grow_up_to(1), 0);
        assert!(!one.grow(usize::MAX));
        drop(other);
        assert!(one.grow(4));
        drop(one);
        assert_eq!(budget.share().grow_up_to(99), 10);
    }
}
