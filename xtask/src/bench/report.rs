//! The bench's table: medians of both sides and their ratio.

use std::fmt;

/// What one side gave, one value per run.
#[derive(Debug, Default)]
pub struct Samples(Vec<f64>);

impl Samples {
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    fn median(&self) -> Option<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => None,
            odd if odd % 2 == 1 => Some(sorted[middle]),
            _ => Some(f64::midpoint(sorted[middle - 1], sorted[middle])),
        }
    }
}

#[derive(Debug)]
struct Row {
    what: &'static str,
    unit: &'static str,
    other: &'static str,
    ours: Samples,
    theirs: Samples,
}

#[derive(Debug, Default)]
pub struct Report(Vec<Row>);

impl Report {
    /// Adds a line that compares Coffer's samples with those of `other`. Smaller is better in all of them.
    pub fn add(
        &mut self,
        what: &'static str,
        unit: &'static str,
        ours: Samples,
        other: &'static str,
        theirs: Samples,
    ) {
        self.0.push(Row {
            what,
            unit,
            other,
            ours,
            theirs,
        });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<38} {:>12} {:>12} {:>8}",
            "median, smaller is better", "Coffer", "other", "ratio"
        )?;
        for row in &self.0 {
            let label = format!("{} [{}]", row.what, row.unit);
            match (row.ours.median(), row.theirs.median()) {
                (Some(ours), Some(theirs)) => {
                    let ratio = ours / theirs;
                    writeln!(
                        f,
                        "{label:<38} {ours:>12.1} {theirs:>12.1} {ratio:>8.2}  vs {}",
                        row.other
                    )?;
                }
                _ => writeln!(f, "{label:<38} {:>12}", "no samples")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        Samples(values.to_vec())
    }

    #[test]
    fn medians_and_ratio() {
        let mut report = Report::default();
        report.add(
            "boot",
            "ms",
            samples(&[3.0, 1.0, 2.0]),
            "QEMU",
            samples(&[4.0, 100.0, 1.0, 4.0]),
        );
        let text = report.to_string();
        let row: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["boot", "[ms]", "2.0", "4.0", "0.50", "vs", "QEMU"]);
    }
}
