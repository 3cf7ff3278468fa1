//! Names of sandboxes, containers and execs.
//!
//! They become path components, cgroup names and unix socket names, so the form is containerd's: 1 to 76 characters
//! of `[A-Za-z0-9_.-]`, beginning and ending with a letter or digit.

use std::fmt;

/// Longest id, as in containerd's `identifiers` package.
pub const MAX_ID_LEN: usize = 76;

/// Why a string is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {value:?} is not valid: {reason}")]
pub struct InvalidId {
    kind: &'static str,
    value: String,
    reason: &'static str,
}

fn check(kind: &'static str, value: &str) -> Result<(), InvalidId> {
    let fail = |reason| {
        Err(InvalidId {
            kind,
            value: value.chars().take(MAX_ID_LEN + 4).collect(),
            reason,
        })
    };
    if value.is_empty() {
        return fail("it is empty");
    }
    if value.len() > MAX_ID_LEN {
        return fail("it is longer than 76 characters");
    }
    if !value
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
    {
        return fail("only letters, digits, '_', '.' and '-' are allowed");
    }
    let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    if !edge(value.as_bytes().first()) || !edge(value.as_bytes().last()) {
        return fail("it must begin and end with a letter or digit");
    }
    Ok(())
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks and takes a name.
            pub fn new(value: impl Into<String>) -> Result<Self, InvalidId> {
                let value = value.into();
                check($kind, &value)?;
                Ok(Self(value))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(value: String) -> Result<Self, InvalidId> {
                Self::new(value)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidId;
            fn from_str(value: &str) -> Result<Self, InvalidId> {
                Self::new(value)
            }
        }

        impl AsRef<std::path::Path> for $name {
            fn as_ref(&self) -> &std::path::Path {
                self.0.as_ref()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:?}", self.0)
            }
        }
    };
}

id!(
    /// One VM: a pod, or the one container of `coffer run`.
    SandboxId,
    "sandbox id"
);
id!(
    /// One container of a sandbox.
    ContainerId,
    "container id"
);
id!(
    /// One further process in a container.
    ExecId,
    "exec id"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "/",
            "-a",
            "a-",
            "a b",
            "a\nb",
            "a\0",
            "é",
            &"a".repeat(77),
        ] {
            assert!(SandboxId::new(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn names_of_containerd_and_podman_are_taken() {
        for good in [
            "a",
            "0",
            "web-1",
            "a.b_c-d",
            &"f".repeat(64),
            &"a".repeat(76),
        ] {
            assert_eq!(ContainerId::new(good).expect(good).as_str(), good);
        }
    }

    #[test]
    fn the_error_names_kind_and_value() {
        let error = ExecId::new("a/b").unwrap_err().to_string();
        assert!(
            error.contains("exec id") && error.contains("a/b"),
            "{error}"
        );
    }
}
