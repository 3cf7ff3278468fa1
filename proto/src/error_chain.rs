//! Errors as they leave a process: one line for a log, a reply or a terminal.

use std::error::Error;

/// An error and its causes in one line. A cause whose text is in the text already is not repeated.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = cause.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt;

    #[derive(Debug)]
    struct Step(&'static str, Option<Box<Step>>);

    impl fmt::Display for Step {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Step {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            self.1.as_deref().map(|step| step as _)
        }
    }

    fn said(steps: &[&'static str]) -> String {
        let whole = steps
            .iter()
            .rev()
            .fold(None, |cause, text| Some(Box::new(Step(text, cause))));
        chain(&*whole.unwrap())
    }

    #[test]
    fn causes_follow_what_they_caused() {
        assert_eq!(
            said(&["can't boot", "can't open /x", "not found"]),
            "can't boot: can't open /x: not found"
        );
    }

    #[test]
    fn a_cause_that_is_said_already_is_not_repeated() {
        assert_eq!(
            said(&["can't boot: not found", "not found", "really"]),
            "can't boot: not found: really"
        );
    }

    #[test]
    fn many_lines_become_one() {
        assert_eq!(
            said(&["can't parse:\n  line 1", "\tno JSON\n"]),
            "can't parse: line 1: no JSON"
        );
    }
}
