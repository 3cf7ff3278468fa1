//! What the caller says must be UTF-8: paths and words travel in JSON and protobuf, which hold nothing else.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;

/// The first of the words that is not.
pub(super) fn misfit(mut words: impl Iterator<Item = OsString>) -> Option<OsString> {
    words.find(|word| word.to_str().is_none())
}

/// A path that was resolved: links and the current directory may have brought in what is not.
pub(super) fn path(path: PathBuf) -> io::Result<PathBuf> {
    match path.to_str() {
        Some(_) => Ok(path),
        None => {
            let message = format!("{path:?} is not UTF-8");
            Err(io::Error::new(io::ErrorKind::InvalidInput, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn what_is_not_unicode_is_found_and_named() {
        let bad = OsString::from_vec(b"--root=/\xff".to_vec());
        let words = ["run".into(), bad.clone()];
        assert_eq!(misfit(words.into_iter()), Some(bad.clone()));
        assert_eq!(misfit(["run".into()].into_iter()), None);
        let error = path(bad.into()).unwrap_err().to_string();
        assert!(error.contains(r"\xFF"), "{error}");
        assert!(path("/ö".into()).is_ok());
    }
}
