//! This executable as a program in a container: it makes the system calls whose numbers it is given, without arguments,
//! and prints their errno.
#![allow(unsafe_code, reason = "system calls by number")]

/// Its name in the container.
pub const NAME: &str = "/probe";

pub fn main() {
    for number in std::env::args()
        .skip(1)
        .filter_map(|arg| arg.parse::<libc::c_long>().ok())
    {
        // SAFETY: all arguments are null; the calls asked for are ones the filter answers, or that fail on a null path.
        let result = unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) };
        let errno = std::io::Error::last_os_error().raw_os_error();
        println!("{}", if result < 0 { errno.unwrap_or(0) } else { 0 });
    }
}
