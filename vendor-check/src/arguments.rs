//! The command line's words, sorted into options and operands.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use vendor_check::check::Places;
use vendor_check::date::Date;
use vendor_check::failure::{Class, Finding, Result};

const WITH_VALUE: [&str; 16] = [
    "root",
    "archives",
    "vendor",
    "judgements",
    "cargo-home",
    "today",
    "from",
    "created",
    "binaries",
    "source",
    "date",
    "sequence",
    "key",
    "release",
    "inputs",
    "check",
];

/// What a person asked for.
pub struct Arguments {
    /// The command.
    pub command: String,
    /// What follows it.
    pub operands: Vec<PathBuf>,
    options: BTreeMap<String, PathBuf>,
}

fn usage(subject: &str, reason: &str) -> Finding {
    Finding::new(Class::Usage, subject, reason)
}

impl Arguments {
    /// Sorts the words.
    ///
    /// # Errors
    /// [`Class::Usage`].
    pub fn parse(words: impl Iterator<Item = OsString>) -> Result<Self> {
        let mut words = words;
        let mut positional = Vec::new();
        let mut options = BTreeMap::new();
        while let Some(word) = words.next() {
            let text = word.to_string_lossy().into_owned();
            match text.strip_prefix("--") {
                Some("json") => {}
                Some(name) if WITH_VALUE.contains(&name) => {
                    let value = words.next().ok_or_else(|| usage(&text, "it needs a value"))?;
                    if options.insert(name.to_owned(), PathBuf::from(value)).is_some() {
                        return Err(usage(&text, "it is there twice"));
                    }
                }
                Some(_) => return Err(usage(&text, "there is no such option")),
                None => positional.push(PathBuf::from(word)),
            }
        }
        if positional.is_empty() {
            return Err(usage("command", "there is none"));
        }
        let command = positional.remove(0).to_string_lossy().into_owned();
        Ok(Self { command, operands: positional, options })
    }

    /// An operand that must be there.
    ///
    /// # Errors
    /// [`Class::Usage`].
    pub fn operand(&self, index: usize) -> Result<PathBuf> {
        self.operands.get(index).cloned().ok_or_else(|| usage(&self.command, "an operand is missing"))
    }

    /// The value of an option, if it is there.
    pub fn optional(&self, name: &str) -> Option<PathBuf> {
        self.options.get(name).cloned()
    }

    /// The value of an option as text, if it is there.
    pub fn optional_text(&self, name: &str) -> Option<String> {
        self.options.get(name).map(|value| value.to_string_lossy().into_owned())
    }

    /// The value of an option.
    ///
    /// # Errors
    /// [`Class::Usage`].
    pub fn option(&self, name: &str) -> Result<PathBuf> {
        self.optional(name).ok_or_else(|| usage(&self.command, &format!("--{name} is missing")))
    }

    /// The value of an option as text.
    ///
    /// # Errors
    /// [`Class::Usage`].
    pub fn text(&self, name: &str) -> Result<String> {
        Ok(self.option(name)?.to_string_lossy().into_owned())
    }

    /// The day as of which things are judged.
    ///
    /// # Errors
    /// [`Class::Usage`].
    pub fn today(&self) -> Result<Date> {
        match self.optional_text("today") {
            None => Ok(Date::today()),
            Some(text) => Date::parse(&text).ok_or_else(|| usage("--today", "it must be YYYY-MM-DD")),
        }
    }

    /// Where things are.
    pub fn places(&self) -> Places {
        let root = self.optional("root").unwrap_or_else(|| ".".into());
        let root = root.canonicalize().unwrap_or(root);
        let or = |name: &str, default: &str| self.optional(name).unwrap_or_else(|| root.join(default));
        let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo"));
        Places {
            archives: or("archives", "dist/crates"),
            vendor: or("vendor", "vendor"),
            judgements: or("judgements", "vendor-check"),
            cargo_home: self
                .optional("cargo-home")
                .or_else(|| std::env::var_os("CARGO_HOME").map(PathBuf::from))
                .or_else(home),
            root,
        }
    }
}
