//! `execCPUAffinity`: the CPUs a further process of a container runs on.

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// A list such as "0-3,7".
pub fn parse(list: &str) -> Result<CpuSet, String> {
    let wrong = || format!("{list:?} is no list of CPUs");
    let number = |text: &str| text.trim().parse::<usize>().map_err(|_| wrong());
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= CpuSet::count() {
            return Err(wrong());
        }
        for cpu in first..=last {
            set.set(cpu).map_err(|_| wrong())?;
        }
    }
    Ok(set)
}

/// Binds the calling process to the CPUs of the list, those of them that exist and that its cgroup allows.
pub fn set(list: &str) -> nix::Result<()> {
    let set = parse(list).map_err(|_| Errno::EINVAL)?;
    sched_setaffinity(Pid::from_raw(0), &set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        let set = parse("0-2,7").unwrap();
        let on: Vec<usize> = (0..16).filter(|cpu| set.is_set(*cpu).unwrap()).collect();
        assert_eq!(on, [0, 1, 2, 7]);
        for wrong in ["", "a", "3-1", "1-", "0,,1", "99999"] {
            assert!(parse(wrong).is_err(), "{wrong:?} was taken");
        }
    }
}
