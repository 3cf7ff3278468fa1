//! Replays the seeds of a target, and whatever once made it fail. For tests of the workspace's members.

use std::path::Path;

pub fn replay(target: &str, run: impl Fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/seeds")
        .join(target);
    let mut count = 0;
    for seed in std::fs::read_dir(&seeds).expect("the seeds are part of the sources") {
        let path = seed.expect("a seed").path();
        println!("{}", path.display());
        let input = std::fs::read(&path).expect("a seed");
        run(&input);
        // What a torn input leads to.
        run(&input[..input.len() / 2]);
        count += 1;
    }
    assert!(count > 0, "no seeds in {}", seeds.display());
}
