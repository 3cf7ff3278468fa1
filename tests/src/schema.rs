//! Checks JSON against the runtime specification's schemas (`tests/schemas/`).
//!
//! They are JSON Schema draft 4, of which they use few keywords. A keyword that is not known here fails the check, so that
//! none is passed over.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};

/// Fails unless `value` is as `file` of `tests/schemas/` says; the error names the place in `value`.
pub fn check(file: &str, value: &Value) -> Result<()> {
    validate(file, &load(file)?, value, "$")
}

fn load(file: &str) -> Result<Value> {
    // In the test node there are no sources, so the schemas are part of the program.
    let text = match file {
        "state-schema.json" => include_str!("../schemas/state-schema.json"),
        "features-schema.json" => include_str!("../schemas/features-schema.json"),
        "features-linux.json" => include_str!("../schemas/features-linux.json"),
        "defs.json" => include_str!("../schemas/defs.json"),
        "defs-linux.json" => include_str!("../schemas/defs-linux.json"),
        other => bail!("there is no schema {other}"),
    };
    serde_json::from_str(text).with_context(|| format!("{file} is not JSON"))
}

fn validate(file: &str, schema: &Value, value: &Value, place: &str) -> Result<()> {
    let schema = schema
        .as_object()
        .with_context(|| format!("{file}: a schema is an object"))?;
    for (keyword, rule) in schema {
        match keyword.as_str() {
            "description" | "$schema" => {}
            "$ref" => follow(file, text(rule)?, value, place)?,
            "type" => ensure!(
                has_type(value, text(rule)?),
                "{place} is no {rule}, but {value}"
            ),
            "enum" => ensure!(
                rule.as_array().is_some_and(|all| all.contains(value)),
                "{place} is {value}, not one of {rule}"
            ),
            "pattern" => ensure!(
                matches(text(rule)?, text(value)?)?,
                "{place} is {value}, which does not match {rule}"
            ),
            "minimum" => ensure!(
                value.as_f64() >= rule.as_f64(),
                "{place} is {value}, less than {rule}"
            ),
            "maximum" => ensure!(
                value.as_f64() <= rule.as_f64(),
                "{place} is {value}, more than {rule}"
            ),
            "required" => {
                for name in rule.as_array().context("required is a list")? {
                    ensure!(value.get(text(name)?).is_some(), "{place} has no {name}");
                }
            }
            "properties" => properties(file, object(rule)?, value, place)?,
            "patternProperties" => any_property(file, object(rule)?, value, place)?,
            "items" => {
                for (n, item) in value.as_array().into_iter().flatten().enumerate() {
                    validate(file, rule, item, &format!("{place}[{n}]"))?;
                }
            }
            "allOf" => {
                for part in rule.as_array().context("allOf is a list")? {
                    validate(file, part, value, place)?;
                }
            }
            other => bail!("{file}: the keyword {other} is not known to this test"),
        }
    }
    Ok(())
}

/// `FILE#/a/b`, or `#/a/b` in the same file.
fn follow(file: &str, reference: &str, value: &Value, place: &str) -> Result<()> {
    let (target, pointer) = reference
        .split_once('#')
        .with_context(|| format!("{reference} has no #"))?;
    let target = if target.is_empty() { file } else { target };
    let schema = load(target)?;
    let schema = schema
        .pointer(pointer)
        .with_context(|| format!("{reference} leads nowhere"))?;
    validate(target, schema, value, place)
}

fn properties(file: &str, rules: &Map<String, Value>, value: &Value, place: &str) -> Result<()> {
    for (name, rule) in rules {
        if let Some(property) = value.get(name) {
            validate(file, rule, property, &format!("{place}.{name}"))?;
        }
    }
    Ok(())
}

/// The only pattern of property names in these schemas is "not empty".
fn any_property(file: &str, rules: &Map<String, Value>, value: &Value, place: &str) -> Result<()> {
    let rule = rules
        .get(".{1,}")
        .context("an unknown pattern of property names")?;
    for (name, property) in value.as_object().into_iter().flatten() {
        ensure!(!name.is_empty(), "{place} has a property without a name");
        validate(file, rule, property, &format!("{place}.{name}"))?;
    }
    Ok(())
}

fn has_type(value: &Value, name: &str) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        _ => false,
    }
}

fn matches(pattern: &str, value: &str) -> Result<bool> {
    match pattern {
        "^CAP_[A-Z_]+$" => Ok(value.strip_prefix("CAP_").is_some_and(|rest| {
            !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
        })),
        other => bail!("the pattern {other} is not known to this test"),
    }
}

fn text(value: &Value) -> Result<&str> {
    value
        .as_str()
        .with_context(|| format!("{value} is no string"))
}

fn object(value: &Value) -> Result<&Map<String, Value>> {
    value
        .as_object()
        .with_context(|| format!("{value} is no object"))
}

#[cfg(test)]
mod tests {
    use super::check;
    use serde_json::json;

    #[test]
    fn finds_what_is_missing_and_what_is_wrong() {
        let good = json!({"ociVersion": "1.2.0", "id": "a", "status": "created", "pid": 1, "bundle": "/b",
            "annotations": {"k": "v"}});
        check("state-schema.json", &good).unwrap();
        for (field, wrong) in [
            ("status", json!("asleep")),
            ("pid", json!(-1)),
            ("annotations", json!({"k": 1})),
            ("id", json!(null)),
        ] {
            let mut bad = good.clone();
            bad[field] = wrong;
            let error = check("state-schema.json", &bad).unwrap_err().to_string();
            assert!(error.contains(&format!("$.{field}")), "{error}");
        }
        let features = json!({"ociVersionMin": "1.0.0", "ociVersionMax": "1.2.0",
            "linux": {"capabilities": ["CAP_CHOWN"], "seccomp": {"actions": ["SCMP_ACT_ALLOW"]}}});
        check("features-schema.json", &features).unwrap();
        let mut bad = features;
        bad["linux"]["capabilities"] = json!(["chown"]);
        check("features-schema.json", &bad).unwrap_err();
    }
}
