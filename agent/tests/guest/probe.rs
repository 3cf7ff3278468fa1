//! This executable as a program in a container, for what a shell can't ask the kernel.
//!
//! `/probe keyring` prints the serial of the session keyring; `/probe NUMBER…` makes these system calls, without
//! arguments, and prints their errno.
#![allow(unsafe_code, reason = "system calls by number")]

/// Its name in the container.
pub const NAME: &str = "/probe";
/// The argument that asks for the session keyring.
const KEYRING: &str = "keyring";

pub fn main() {
    if std::env::args().nth(1).as_deref() == Some(KEYRING) {
        println!("{}", session_keyring());
        return;
    }
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

/// keyctl(2); -1 for none.
pub fn session_keyring() -> libc::c_long {
    const KEYCTL_GET_KEYRING_ID: libc::c_int = 0;
    const KEY_SPEC_SESSION_KEYRING: libc::c_int = -3;
    // SAFETY: three integers; the last says that no keyring is to be made.
    unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_GET_KEYRING_ID,
            KEY_SPEC_SESSION_KEYRING,
            0,
        )
    }
}
