//! Licences: the SPDX expression of the metadata, the texts in the archive, the allow list, and the
//! NOTICE that a release carries.

use std::collections::BTreeSet;

use crate::archive::Archive;
use crate::codec::sha256;
use crate::failure::{Class, Report};
use crate::manifest::Manifest;
use crate::policy::Policy;

/// How deep an expression may nest.
const MAX_DEPTH: usize = 16;

/// A licence expression (SPDX 2.3, annex D).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    /// A licence, with its exception if it has one.
    Licence(String),
    /// All of them apply.
    All(Vec<Expression>),
    /// One may be chosen.
    Any(Vec<Expression>),
}

impl Expression {
    /// Parses an expression; the "A/B" of old crates is "A OR B".
    pub fn parse(text: &str) -> Option<Self> {
        let spaced = text.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
        let words: Vec<&str> = spaced.split_whitespace().collect();
        let (expression, rest) = Self::any(&words, 0)?;
        rest.is_empty().then_some(expression)
    }

    fn any<'w>(words: &'w [&'w str], depth: usize) -> Option<(Self, &'w [&'w str])> {
        let (first, mut rest) = Self::all(words, depth)?;
        let mut parts = vec![first];
        while let Some(("OR", after)) = rest.split_first().map(|(word, after)| (*word, after)) {
            let (next, after) = Self::all(after, depth)?;
            parts.push(next);
            rest = after;
        }
        Some((if parts.len() == 1 { parts.remove(0) } else { Expression::Any(parts) }, rest))
    }

    fn all<'w>(words: &'w [&'w str], depth: usize) -> Option<(Self, &'w [&'w str])> {
        let (first, mut rest) = Self::one(words, depth)?;
        let mut parts = vec![first];
        while let Some(("AND", after)) = rest.split_first().map(|(word, after)| (*word, after)) {
            let (next, after) = Self::one(after, depth)?;
            parts.push(next);
            rest = after;
        }
        Some((if parts.len() == 1 { parts.remove(0) } else { Expression::All(parts) }, rest))
    }

    fn one<'w>(words: &'w [&'w str], depth: usize) -> Option<(Self, &'w [&'w str])> {
        let (word, rest) = words.split_first()?;
        if *word == "(" {
            let (inner, rest) = if depth < MAX_DEPTH { Self::any(rest, depth + 1)? } else { return None };
            return (rest.first() == Some(&")")).then(|| (inner, &rest[1..]));
        }
        let valid =
            |word: &str| word.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'.' | b'+'));
        if !valid(word) || matches!(*word, "AND" | "OR" | "WITH") {
            return None;
        }
        match rest {
            ["WITH", exception, rest @ ..] if valid(exception) => {
                Some((Expression::Licence(format!("{word} WITH {exception}")), rest))
            }
            _ => Some((Expression::Licence((*word).to_owned()), rest)),
        }
    }

    /// Whether the allowed licences can satisfy it.
    pub fn allowed(&self, allow: &BTreeSet<String>) -> bool {
        match self {
            Expression::Licence(licence) => allow.contains(licence),
            Expression::All(parts) => parts.iter().all(|part| part.allowed(allow)),
            Expression::Any(parts) => parts.iter().any(|part| part.allowed(allow)),
        }
    }

    /// Every licence in it.
    pub fn licences(&self) -> BTreeSet<&str> {
        match self {
            Expression::Licence(licence) => BTreeSet::from([licence.as_str()]),
            Expression::All(parts) | Expression::Any(parts) => {
                parts.iter().flat_map(Self::licences).collect()
            }
        }
    }

    /// The expression as SPDX writes it.
    pub fn to_spdx(&self) -> String {
        let join = |parts: &[Expression], word: &str| {
            let parts: Vec<String> = parts
                .iter()
                .map(|part| {
                    if matches!(part, Expression::Licence(_)) {
                        part.to_spdx()
                    } else {
                        format!("({})", part.to_spdx())
                    }
                })
                .collect();
            parts.join(word)
        };
        match self {
            Expression::Licence(licence) => licence.clone(),
            Expression::All(parts) => join(parts, " AND "),
            Expression::Any(parts) => join(parts, " OR "),
        }
    }
}

/// What tells a licence by its text, white space folded and in lower case. All of a row's phrases
/// must be there; a row with `unless` does not count where that is there too.
const TEXTS: [(&str, &[&str], &str); 17] = [
    ("Apache-2.0", &["apache license", "version 2.0, january 2004"], ""),
    (
        "MIT",
        &[
            "permission is hereby granted, free of charge",
            "the above copyright notice and this permission notice",
        ],
        "x11 license",
    ),
    (
        "BSD-3-Clause",
        &["redistribution and use in source and binary forms", "used to endorse or promote products"],
        "",
    ),
    (
        "BSD-2-Clause",
        &["redistribution and use in source and binary forms"],
        "used to endorse or promote products",
    ),
    (
        "ISC",
        &[
            "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee",
            "provided that the above copyright notice",
        ],
        "",
    ),
    (
        "0BSD",
        &[
            "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee is hereby granted.",
        ],
        "provided that the above copyright notice",
    ),
    ("Zlib", &["this software is provided 'as-is'", "must not be misrepresented"], ""),
    ("Unlicense", &["this is free and unencumbered software released into the public domain"], ""),
    ("BSL-1.0", &["boost software license - version 1.0"], ""),
    ("CC0-1.0", &["cc0 1.0 universal"], ""),
    ("Unicode-3.0", &["unicode license v3"], ""),
    ("Unicode-DFS-2016", &["unicode, inc. license agreement - data files and software"], ""),
    ("MPL-2.0", &["mozilla public license version 2.0"], ""),
    ("GPL", &["gnu general public license"], "gnu lesser general public license"),
    ("LGPL", &["gnu lesser general public license"], ""),
    ("AGPL", &["gnu affero general public license"], ""),
    ("SSPL", &["server side public license"], ""),
];

/// The licences whose texts a file has in it.
pub fn identify(text: &str) -> BTreeSet<&'static str> {
    let folded = text
        .to_lowercase()
        .split_whitespace()
        .map(|word| word.trim_start_matches(['*', '#', '>']))
        .filter(|word| !word.is_empty() && *word != "//")
        .collect::<Vec<_>>()
        .join(" ");
    // The MPL names the GNU licences as secondary ones.
    let mpl = folded.contains("mozilla public license version 2.0");
    TEXTS
        .iter()
        .filter(|(name, phrases, unless)| {
            phrases.iter().all(|phrase| folded.contains(phrase))
                && (unless.is_empty() || !folded.contains(unless))
                && !(mpl && name.ends_with("GPL"))
        })
        .map(|(name, ..)| *name)
        .collect()
}

/// Whether a top-level file is there to state the licence.
fn is_licence_file(path: &str, manifest: &Manifest) -> bool {
    let upper = path.to_uppercase();
    let name = upper.rsplit('/').next().unwrap_or_default();
    let source = [".RS", ".TOML", ".PY", ".SH"].iter().any(|suffix| name.ends_with(suffix));
    let top = !path.contains('/') || upper.starts_with("LICENSES/");
    let prefix = ["LICENSE", "LICENCE", "COPYING", "UNLICENSE", "COPYRIGHT"]
        .iter()
        .any(|prefix| name.starts_with(prefix));
    manifest.license_file.as_deref() == Some(path)
        || (top && !source && (prefix || upper.starts_with("LICENSES/")))
}

/// What is known of a crate's licence.
#[derive(Clone, Debug)]
pub struct Licence {
    /// The expression of the metadata.
    pub expression: Expression,
    /// The files with licence texts.
    pub files: Vec<String>,
}

/// Checks a crate's licence; the licence itself where the metadata has one.
pub fn check(
    archive: &Archive,
    manifest: &Manifest,
    policy: &Policy,
    report: &mut Report,
) -> Option<Licence> {
    let name = archive.id.to_string();
    let clarified = |path: Option<&str>, hash: Option<&str>| {
        policy
            .clarifications
            .iter()
            .find(|one| {
                one.crate_id == name
                    && one.file.as_ref().map(|(path, hash)| (path.as_str(), hash.as_str())) == path.zip(hash)
            })
            .map(|one| one.licences.iter().map(String::as_str).collect::<BTreeSet<_>>())
    };
    let Some(text) = &manifest.license else {
        report.fail(Class::LicenceMissing, name, "its Cargo.toml has no license");
        return None;
    };
    let Some(expression) = Expression::parse(text) else {
        report.fail(Class::LicenceMismatch, name, format!("its license {text:?} is no SPDX expression"));
        return None;
    };
    if !expression.allowed(&policy.licences) {
        report.fail(Class::LicenceDenied, &name, format!("{text}: the allow list cannot satisfy it"));
    }
    let declared = expression.licences();
    // "GPL" in a text is any of its versions in the metadata.
    let covers = |declared: &str, found: &str| {
        let base = declared.split(" WITH ").next().unwrap_or_default();
        base == found || base.strip_prefix(found).is_some_and(|rest| rest.starts_with('-'))
    };
    let mut seen = BTreeSet::new();
    let mut files = Vec::new();
    for (path, data) in archive.files().filter(|(path, _)| is_licence_file(path, manifest)) {
        let hash = sha256(data);
        let found =
            clarified(Some(path), Some(&hash)).unwrap_or_else(|| identify(&String::from_utf8_lossy(data)));
        // A COPYRIGHT file often names the authors only.
        if found.is_empty() && !path.to_uppercase().starts_with("COPYRIGHT") {
            let reason = format!("{path} (SHA-256 {hash}) is no licence text that is known here");
            report.fail(Class::LicenceMismatch, &name, reason);
        }
        for licence in &found {
            if !declared.iter().any(|declared| covers(declared, licence)) {
                let reason = format!("{path} has the text of {licence}, the metadata says {text}");
                report.fail(Class::LicenceMismatch, &name, reason);
            }
        }
        seen.extend(found.iter().map(|licence| (*licence).to_owned()));
        files.push(path.to_owned());
    }
    let has_text = seen.iter().any(|licence| declared.iter().any(|declared| covers(declared, licence)));
    if !has_text && clarified(None, None).is_none() {
        report.fail(Class::LicenceMissing, &name, format!("its archive has no text of {text}"));
    }
    Some(Licence { expression, files })
}

/// One section of NOTICE.
pub fn notice_section(archive: &Archive, licence: &Licence) -> String {
    let mut text = format!("{}\nLicence: {}\n", archive.id, licence.expression.to_spdx());
    for path in &licence.files {
        text.push_str(&format!("\n--- {path} ---\n"));
        text.push_str(archive.text(path).unwrap_or_default().trim_end());
        text.push('\n');
    }
    if licence.files.is_empty() {
        text.push_str("\nThe archive of this crate has no licence text.\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions() {
        let allow: BTreeSet<String> =
            ["MIT", "Unicode-3.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned).into();
        for (text, allowed) in [
            ("MIT", true),
            ("MIT OR Apache-2.0", true),
            ("MIT/Apache-2.0", true),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
            ("MIT AND GPL-3.0-only", false),
            ("Apache-2.0 WITH LLVM-exception", true),
            ("GPL-2.0-only OR AGPL-3.0-only", false),
        ] {
            assert_eq!(
                Expression::parse(text).map(|expression| expression.allowed(&allow)),
                Some(allowed),
                "{text}"
            );
        }
        for wrong in ["", "MIT OR", "(MIT", "MIT)", "MIT Apache-2.0", "OR", "MIT WITH", "M IT", "MIT; DROP"] {
            assert_eq!(Expression::parse(wrong), None, "{wrong}");
        }
        let text = "(MIT OR Apache-2.0) AND Unicode-3.0";
        assert_eq!(Expression::parse(text).map(|expression| expression.to_spdx()).as_deref(), Some(text));
    }

    #[test]
    fn texts() {
        let mit = "Permission is hereby granted, free of\ncharge, to any person.\n The above copyright notice and this permission notice shall";
        assert_eq!(identify(mit), BTreeSet::from(["MIT"]));
        assert_eq!(identify("GNU GENERAL PUBLIC\n LICENSE"), BTreeSet::from(["GPL"]));
        assert_eq!(identify("do what you like"), BTreeSet::new());
    }
}
