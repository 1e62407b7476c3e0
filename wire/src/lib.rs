//! Wrenn.
