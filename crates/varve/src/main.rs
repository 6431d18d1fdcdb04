//! Varve.
fn main() {}
