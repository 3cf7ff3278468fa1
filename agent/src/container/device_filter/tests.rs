//! The assembled programs run in a small interpreter of the instructions used; the guest tests load them for real.

use super::*;
use oci_spec::runtime::LinuxDeviceCgroupBuilder;
use proptest::prelude::*;

/// What the kernel's interpreter would return.
fn run(code: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> u64 {
    let context = [(access << 16) | kind, major, minor];
    let mut r = [0u64; 11];
    let wide = |value: i32| i64::from(value).cast_unsigned();
    let mut pc = 0;
    for _ in 0..code.len() {
        let mut over = 0;
        match code[pc] {
            LoadWord(to, _, offset) => {
                r[to as usize] = context[usize::try_from(offset).unwrap() / 4].into();
            }
            Move(to, from) => r[to as usize] = r[from as usize],
            Set(to, value) => r[to as usize] = wide(value),
            And(to, value) => r[to as usize] &= wide(value),
            ShiftRight(to, bits) => r[to as usize] >>= bits,
            Jump(by) => over = by,
            JumpIfEqual(register, value, by) if r[register as usize] == wide(value) => over = by,
            JumpIfNotEqual(register, value, by) if r[register as usize] != wide(value) => over = by,
            JumpIfSet(register, value, by) if r[register as usize] & wide(value) != 0 => over = by,
            JumpIfEqual(..) | JumpIfNotEqual(..) | JumpIfSet(..) => {}
            Exit => return r[R0 as usize],
            other => panic!("no such instruction: {other:?}"),
        }
        pc += 1 + usize::try_from(over).unwrap();
    }
    panic!("the program has no end")
}

/// The rules as the spec tells them: for each access the last rule that matches decides.
fn expected(rules: &[Rule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
    [MKNOD, READ, WRITE]
        .into_iter()
        .filter(|bit| access & u32::from(*bit) != 0)
        .all(|bit| {
            let last = rules.iter().rev().find(|rule| {
                rule.access & bit != 0
                    && rule.kind.is_none_or(|k| k as u32 == kind)
                    && rule.major.is_none_or(|m| m == major)
                    && rule.minor.is_none_or(|m| m == minor)
            });
            last.is_some_and(|rule| rule.allow)
        })
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let kind = prop_oneof![Just(None), Just(Some(Kind::Block)), Just(Some(Kind::Char))];
    (
        any::<bool>(),
        kind,
        prop::option::of(0..3u32),
        prop::option::of(0..3u32),
        0..8u8,
    )
        .prop_map(|(allow, kind, major, minor, access)| Rule {
            allow,
            kind,
            major,
            minor,
            access,
        })
}

proptest! {
    #[test]
    fn the_program_decides_as_the_rules_say(
        rules in prop::collection::vec(any_rule(), 0..8),
        kind in 1..3u32, access in 1..8u32, major in 0..3u32, minor in 0..3u32,
    ) {
        let allowed = run(&assemble(&rules), kind, access, major, minor) == 1;
        prop_assert_eq!(allowed, expected(&rules, kind, access, major, minor));
    }
}

#[test]
fn rules_of_the_spec_are_parsed() {
    let deny_all = LinuxDeviceCgroupBuilder::default()
        .allow(false)
        .access("rwm")
        .build()
        .unwrap();
    let parsed = rule(&deny_all).unwrap();
    assert_eq!(
        (parsed.allow, parsed.kind, parsed.access),
        (false, None, MKNOD | READ | WRITE)
    );
    let odd = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .access("rx")
        .build()
        .unwrap();
    assert_eq!(rule(&odd), Err("access is made of r, w and m"));
}
