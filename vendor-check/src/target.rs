//! `cfg(...)` conditions of dependencies, for the targets that this project ships for.

/// How deep a condition may nest.
const MAX_DEPTH: usize = 16;

/// A compilation target and what `rustc --print cfg` says of it.
#[derive(Clone, Debug)]
pub struct Target {
    triple: String,
    environment: &'static str,
}

impl Target {
    /// A target by its triple; `None` for one that this program does not know.
    pub fn new(triple: &str) -> Option<Self> {
        let environment = match triple {
            "x86_64-unknown-linux-gnu" => "gnu",
            "x86_64-unknown-linux-musl" => "musl",
            _ => return None,
        };
        Some(Self { triple: triple.to_owned(), environment })
    }

    /// Whether a `[target.…]` key is for this target; `None` if it cannot be read.
    pub fn matches(&self, condition: &str) -> Option<bool> {
        match condition.strip_prefix("cfg(").and_then(|rest| rest.strip_suffix(')')) {
            None if condition.starts_with("cfg") => None,
            None => Some(condition == self.triple),
            Some(inner) => {
                let (value, rest) = self.expression(inner.trim_start(), 0)?;
                rest.is_empty().then_some(value)
            }
        }
    }

    fn name(&self, name: &str) -> bool {
        // Anything that a project sets with --cfg is off: releases set none.
        matches!(name, "unix" | "true" | "panic_abort")
    }

    fn pair(&self, name: &str, value: &str) -> bool {
        match name {
            "target_os" => value == "linux",
            "target_family" => value == "unix",
            "target_arch" => value == "x86_64",
            "target_env" => value == self.environment,
            "target_vendor" => value == "unknown",
            "target_endian" => value == "little",
            "target_pointer_width" => value == "64",
            "target_has_atomic" => matches!(value, "8" | "16" | "32" | "64" | "ptr"),
            "target_feature" => matches!(value, "fxsr" | "sse" | "sse2"),
            "panic" => value == "abort",
            _ => false,
        }
    }

    /// One expression; gives what follows it.
    fn expression<'t>(&self, text: &'t str, depth: usize) -> Option<(bool, &'t str)> {
        if depth > MAX_DEPTH {
            return None;
        }
        let end = text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        let rest = rest.trim_start();
        if name.is_empty() {
            return None;
        }
        if let Some(rest) = rest.strip_prefix('=') {
            let (value, rest) = rest.trim_start().strip_prefix('"')?.split_once('"')?;
            return Some((self.pair(name, value), rest.trim_start()));
        }
        let Some(rest) = rest.strip_prefix('(') else { return Some((self.name(name), rest)) };
        let (mut rest, mut values) = (rest.trim_start(), Vec::new());
        loop {
            if let Some(after) = rest.strip_prefix(')') {
                let value = match name {
                    "all" => values.iter().all(|value| *value),
                    "any" => values.iter().any(|value| *value),
                    "not" if values.len() == 1 => !values[0],
                    _ => return None,
                };
                return Some((value, after.trim_start()));
            }
            let (value, after) = self.expression(rest, depth + 1)?;
            values.push(value);
            rest = match after.strip_prefix(',') {
                Some(after) => after.trim_start(),
                None if after.starts_with(')') => after,
                None => return None,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions() {
        let target = Target::new("x86_64-unknown-linux-gnu").expect("known");
        for (condition, expected) in [
            ("cfg(unix)", Some(true)),
            ("cfg(windows)", Some(false)),
            ("cfg(not(windows))", Some(true)),
            ("cfg(all(unix, not(target_os = \"macos\")))", Some(true)),
            ("cfg(any(target_os = \"hermit\", target_arch = \"wasm32\",))", Some(false)),
            ("cfg(all())", Some(true)),
            ("cfg(any())", Some(false)),
            ("cfg(tokio_unstable)", Some(false)),
            ("x86_64-unknown-linux-gnu", Some(true)),
            ("x86_64-pc-windows-msvc", Some(false)),
            ("cfg(not(a, b))", None),
            ("cfg(unix", None),
            ("cfg(maybe(unix))", None),
            ("cfg(target_os = linux)", None),
            ("cfg()", None),
        ] {
            assert_eq!(target.matches(condition), expected, "{condition}");
        }
        assert!(Target::new("riscv64gc-unknown-none-elf").is_none());
    }
}
