//! How a VM ended.

/// How the supervisor ends a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The agent was asked to power off.
    ShutDown,
    /// Without the guest.
    Killed,
}

impl End {
    pub fn reason(self) -> &'static str {
        match self {
            Self::ShutDown => "it was shut down",
            Self::Killed => "it was killed by its supervisor",
        }
    }
}

/// Why a machine is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    pub reason: String,
    /// The host's kernel killed a process of it for want of memory.
    pub out_of_memory: bool,
}

impl From<String> for Death {
    fn from(reason: String) -> Self {
        Self {
            reason,
            out_of_memory: false,
        }
    }
}
