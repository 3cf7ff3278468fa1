mod container;
fn main() {}
