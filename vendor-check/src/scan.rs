//! A Rust lexer that is just good enough to count: it knows comments, strings, characters and
//! lifetimes, so that `unsafe` in a comment is no `unsafe`.

/// A token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    Word(&'a str),
    /// A string literal, without its quotes and with its escapes as they are.
    Text(&'a str),
    Sign(u8),
}

/// What a source file has in it that an auditor looks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Lines of the file.
    pub lines: u64,
    /// Uses of the word `unsafe`: blocks, functions, impls, attributes.
    pub unsafe_uses: u64,
    /// `extern` blocks and functions, `#[link]`, inline and global assembly.
    pub foreign: u64,
    /// The arguments of `include!`, `include_str!`, `include_bytes!` and `#[path]`: the literal, or
    /// the words of an expression.
    pub includes: Vec<String>,
}

/// Scans one source file.
pub fn scan(source: &str) -> Found {
    let tokens = tokens(source);
    let mut found = Found { lines: source.lines().count() as u64, ..Found::default() };
    for (index, token) in tokens.iter().enumerate() {
        let next = tokens.get(index + 1);
        match token {
            Token::Word("unsafe") => found.unsafe_uses += 1,
            Token::Word("extern") if !matches!(next, Some(Token::Word("crate"))) => found.foreign += 1,
            Token::Word("link") if preceded_by_attribute(&tokens, index) => found.foreign += 1,
            Token::Word("asm" | "global_asm" | "naked_asm") if next == Some(&Token::Sign(b'!')) => {
                found.foreign += 1
            }
            Token::Word("include" | "include_str" | "include_bytes") if next == Some(&Token::Sign(b'!')) => {
                found.includes.push(argument(&tokens[index + 2..]));
            }
            Token::Word("path")
                if next == Some(&Token::Sign(b'=')) && preceded_by_attribute(&tokens, index) =>
            {
                if let Some(Token::Text(path)) = tokens.get(index + 2) {
                    found.includes.push((*path).to_owned());
                }
            }
            _ => {}
        }
    }
    found
}

/// Whether the token at `index` is the first of an attribute: `#[`, `#![` or `unsafe(` before it.
fn preceded_by_attribute(tokens: &[Token<'_>], index: usize) -> bool {
    match index.checked_sub(1).map(|before| tokens[before]) {
        Some(Token::Sign(b'[')) => index >= 2 && matches!(tokens[index - 2], Token::Sign(b'#' | b'!')),
        Some(Token::Sign(b'(')) => index >= 2 && matches!(tokens[index - 2], Token::Word("unsafe")),
        // cfg_attr(condition, path = "…")
        Some(Token::Sign(b',')) => true,
        _ => false,
    }
}

/// The argument of a macro call: a lone literal as it is, anything else as its words.
fn argument(tokens: &[Token<'_>]) -> String {
    const MAX_TOKENS: usize = 64;
    let mut depth = 0usize;
    let mut parts: Vec<String> = Vec::new();
    for token in tokens.iter().take(MAX_TOKENS) {
        match token {
            Token::Sign(b'(' | b'[' | b'{') => depth += 1,
            Token::Sign(b')' | b']' | b'}') => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    break;
                }
            }
            Token::Sign(_) => {}
            Token::Word(word) => parts.push((*word).to_owned()),
            Token::Text(text) => parts.push(format!("\"{text}\"")),
        }
    }
    match parts.as_slice() {
        [one] => one.trim_matches('"').to_owned(),
        many => many.join(" "),
    }
}

fn tokens(source: &str) -> Vec<Token<'_>> {
    let bytes = source.as_bytes();
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let next = bytes.get(at + 1).copied();
        match byte {
            b'/' if next == Some(b'/') => at = line_end(bytes, at),
            b'/' if next == Some(b'*') => at = comment_end(bytes, at),
            b'"' => {
                let end = string_end(bytes, at + 1);
                tokens.push(Token::Text(slice(source, at + 1, end)));
                at = end + 1;
            }
            b'\'' => at = quote_end(bytes, at),
            b'r' | b'b' | b'c' if prefixed_string(bytes, at).is_some() => {
                let (start, end, after) = prefixed_string(bytes, at).unwrap_or((at, at, at + 1));
                tokens.push(Token::Text(slice(source, start, end)));
                at = after;
            }
            b'_' | b'a'..=b'z' | b'A'..=b'Z' | 0x80.. => {
                let end = word_end(bytes, at);
                let word = slice(source, at, end);
                // A raw identifier, r#unsafe, is a name like any other.
                if word == "r" && bytes.get(end) == Some(&b'#') {
                    at = word_end(bytes, end + 1).max(end + 1);
                } else {
                    tokens.push(Token::Word(word));
                    at = end;
                }
            }
            b'0'..=b'9' => at = word_end(bytes, at),
            byte => {
                if !byte.is_ascii_whitespace() {
                    tokens.push(Token::Sign(byte));
                }
                at += 1;
            }
        }
    }
    tokens
}

fn slice(source: &str, start: usize, end: usize) -> &str {
    source.get(start..end.min(source.len())).unwrap_or_default()
}

fn word_end(bytes: &[u8], start: usize) -> usize {
    let part = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80;
    start + bytes[start.min(bytes.len())..].iter().take_while(|byte| part(byte)).count()
}

fn line_end(bytes: &[u8], start: usize) -> usize {
    start + bytes[start..].iter().take_while(|byte| **byte != b'\n').count()
}

/// Block comments nest.
fn comment_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start + 2;
    let mut depth = 1;
    while depth > 0 && at < bytes.len() {
        match bytes.get(at..at + 2) {
            Some(b"/*") => (depth, at) = (depth + 1, at + 2),
            Some(b"*/") => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    at
}

/// The position of the closing quote.
fn string_end(bytes: &[u8], start: usize) -> usize {
    let mut at = start;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b'\\' => at += 2,
            b'"' => return at,
            _ => at += 1,
        }
    }
    bytes.len()
}

/// A character literal or a lifetime, from its quote.
fn quote_end(bytes: &[u8], start: usize) -> usize {
    match bytes.get(start + 1) {
        Some(b'\\') => {
            let mut at = start + 3;
            while bytes.get(at).is_some_and(|byte| *byte != b'\'' && *byte != b'\n') {
                at += 1;
            }
            at + 1
        }
        Some(_) => {
            let end = word_end(bytes, start + 1).max(start + 2);
            if bytes.get(end) == Some(&b'\'') {
                end + 1
            } else {
                end.min(word_end(bytes, start + 1).max(start + 1))
            }
        }
        None => start + 1,
    }
}

/// r"…", r#"…"#, b"…", br#"…"#, c"…", b'…': the content's start and end, and what follows.
fn prefixed_string(bytes: &[u8], start: usize) -> Option<(usize, usize, usize)> {
    let mut at = start;
    if matches!(bytes[at], b'b' | b'c') {
        at += 1;
    }
    let raw = bytes.get(at) == Some(&b'r');
    if raw {
        at += 1;
    }
    let hashes = if raw { bytes[at..].iter().take_while(|byte| **byte == b'#').count() } else { 0 };
    at += hashes;
    match bytes.get(at) {
        Some(b'"') if raw => {
            let mut closing = vec![b'"'];
            closing.resize(hashes + 1, b'#');
            let content = at + 1;
            let length = bytes[content..].windows(closing.len()).position(|window| window == closing);
            let end = length.map_or(bytes.len(), |length| content + length);
            Some((content, end, (end + closing.len()).min(bytes.len())))
        }
        Some(b'"') if at > start => {
            let end = string_end(bytes, at + 1);
            Some((at + 1, end, end + 1))
        }
        Some(b'\'') if at > start && !raw && bytes[start] == b'b' => Some((at, at, quote_end(bytes, at))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsafe_is_counted_only_where_it_is_code() {
        let source = r###"
            // unsafe
            /* unsafe /* unsafe */ unsafe */
            const A: &str = "unsafe \" unsafe";
            const B: &str = r#"unsafe " unsafe"#;
            const C: u8 = b'"'; const D: char = '"'; const E: char = '\''; const F: &[u8] = b"unsafe";
            fn f<'a>(x: &'a str) { unsafe { g() } }
            unsafe impl Send for X {}
            fn r#unsafe() {}
            #[unsafe(no_mangle)] pub extern "C" fn h() {}
        "###;
        let found = scan(source);
        assert_eq!(found.unsafe_uses, 3);
        assert_eq!(found.foreign, 1);
    }

    #[test]
    fn includes_paths_and_foreign_code() {
        let source = r#"
            extern crate std;
            extern "C" { fn x(); }
            #[link(name = "z")] extern "C" {}
            core::arch::asm!("nop");
            include!("a.rs");
            include_str!(concat!(env!("OUT_DIR"), "/b.rs"));
            #[path = "../c.rs"] mod c;
            #[cfg_attr(x, path = "d.rs")] mod d;
            let path = "not one";
        "#;
        let found = scan(source);
        assert_eq!(found.foreign, 4);
        assert_eq!(found.includes, ["a.rs", "concat env \"OUT_DIR\" \"/b.rs\"", "../c.rs", "d.rs"]);
    }

    #[test]
    fn nothing_that_is_cut_off_panics() {
        let source = "r#\"a\"# b'x' '\\'' /* */ \"s\\\"\" 'life x' é unsafe r##\"";
        for end in (0..source.len()).filter(|end| source.is_char_boundary(*end)) {
            scan(&source[..end]);
        }
    }
}
