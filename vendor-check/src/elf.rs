//! ELF files (little-endian, 64 bits): a section found by its name, and one added at the end of the
//! file without moving a byte that the program is loaded from.

use std::fmt;

const HEADER_BYTES: usize = 64;
const SECTION_HEADER_BYTES: usize = 64;
/// Far more sections than a linker makes.
const MAX_SECTIONS: usize = 4096;
/// elf.h: SHT_PROGBITS.
const SHT_PROGBITS: u32 = 1;
/// Offsets in the file header (elf.h, Elf64_Ehdr).
const E_SHOFF: usize = 40;
const E_SHENTSIZE: usize = 58;
const E_SHNUM: usize = 60;
const E_SHSTRNDX: usize = 62;
/// Offsets in a section header (elf.h, Elf64_Shdr).
const SH_OFFSET: usize = 24;
const SH_SIZE: usize = 32;

/// Why a file was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElfError {
    /// Not an ELF file of this kind.
    NotElf,
    /// A table or section lies outside the file.
    Malformed(&'static str),
    /// The section to add is there already, or is there twice.
    Duplicate,
}

impl fmt::Display for ElfError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ElfError::NotElf => f.write_str("it is no 64-bit little-endian ELF file"),
            ElfError::Malformed(what) => write!(f, "its {what} lies outside the file"),
            ElfError::Duplicate => f.write_str("it has the section already"),
        }
    }
}

impl std::error::Error for ElfError {}

fn u16_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)).ok()
}

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?)).ok()
}

/// The section headers and the names' section.
struct Sections<'a> {
    headers: &'a [u8],
    names: &'a [u8],
    names_index: usize,
}

fn sections(file: &[u8]) -> Result<Sections<'_>, ElfError> {
    // \x7fELF, 64 bits, little-endian, version 1.
    if file.len() < HEADER_BYTES || file[..7] != *b"\x7fELF\x02\x01\x01" {
        return Err(ElfError::NotElf);
    }
    const TABLE: ElfError = ElfError::Malformed("section table");
    let count = u16_at(file, E_SHNUM).ok_or(TABLE)?;
    if count > MAX_SECTIONS || (count > 0 && u16_at(file, E_SHENTSIZE) != Some(SECTION_HEADER_BYTES)) {
        return Err(TABLE);
    }
    let start = u64_at(file, E_SHOFF).ok_or(TABLE)?;
    let end = start.checked_add(count * SECTION_HEADER_BYTES).ok_or(TABLE)?;
    let headers = file.get(start..end).ok_or(TABLE)?;
    let names_index = u16_at(file, E_SHSTRNDX).ok_or(TABLE)?;
    let header = headers.chunks_exact(SECTION_HEADER_BYTES).nth(names_index);
    let names =
        header.and_then(|header| content(file, header)).ok_or(ElfError::Malformed("table of names"))?;
    Ok(Sections { headers, names, names_index })
}

fn content<'a>(file: &'a [u8], header: &[u8]) -> Option<&'a [u8]> {
    let start = u64_at(header, SH_OFFSET)?;
    file.get(start..start.checked_add(u64_at(header, SH_SIZE)?)?)
}

fn name_of<'a>(sections: &Sections<'a>, header: &[u8]) -> Option<&'a [u8]> {
    let rest = sections.names.get(u32_at(header, 0)?..)?;
    rest.split(|byte| *byte == 0).next()
}

/// The content of the section of that name, if there is one.
///
/// # Errors
/// [`ElfError`].
pub fn section<'a>(file: &'a [u8], name: &str) -> Result<Option<&'a [u8]>, ElfError> {
    let sections = sections(file)?;
    let mut found = None;
    for header in sections.headers.chunks_exact(SECTION_HEADER_BYTES) {
        if name_of(&sections, header) == Some(name.as_bytes()) {
            let content = content(file, header).ok_or(ElfError::Malformed("section"))?;
            if found.replace(content).is_some() {
                return Err(ElfError::Duplicate);
            }
        }
    }
    Ok(found)
}

/// The file with one more section. The new table of names, the content and the new section table
/// follow the old end of the file: nothing that is loaded moves, and the same input gives the same
/// output.
///
/// # Errors
/// [`ElfError`].
pub fn add_section(file: &[u8], name: &str, data: &[u8]) -> Result<Vec<u8>, ElfError> {
    if section(file, name)?.is_some() {
        return Err(ElfError::Duplicate);
    }
    let old = sections(file)?;
    let mut output = file.to_vec();
    let mut headers = old.headers.to_vec();

    let names_offset = output.len();
    let name_offset = old.names.len() as u32;
    output.extend(old.names);
    output.extend(name.as_bytes());
    output.push(0);
    let names_size = output.len() - names_offset;
    let names_header = old.names_index * SECTION_HEADER_BYTES;
    put(&mut headers, names_header + SH_OFFSET, &(names_offset as u64).to_le_bytes());
    put(&mut headers, names_header + SH_SIZE, &(names_size as u64).to_le_bytes());

    let data_offset = output.len();
    output.extend(data);
    let mut header = [0u8; SECTION_HEADER_BYTES];
    put(&mut header, 0, &name_offset.to_le_bytes());
    put(&mut header, 4, &SHT_PROGBITS.to_le_bytes());
    put(&mut header, SH_OFFSET, &(data_offset as u64).to_le_bytes());
    put(&mut header, SH_SIZE, &(data.len() as u64).to_le_bytes());
    // sh_addralign
    put(&mut header, 48, &1u64.to_le_bytes());
    headers.extend(header);

    output.resize(output.len().next_multiple_of(8), 0);
    let table_offset = output.len() as u64;
    let count = (headers.len() / SECTION_HEADER_BYTES) as u16;
    output.extend(headers);
    put(&mut output, E_SHOFF, &table_offset.to_le_bytes());
    put(&mut output, E_SHNUM, &count.to_le_bytes());
    Ok(output)
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This test's own program.
    fn program() -> Vec<u8> {
        std::env::current_exe().and_then(std::fs::read).expect("the test's own program")
    }

    #[test]
    fn a_section_is_added_and_found_and_nothing_else_moves() {
        let before = program();
        let after = add_section(&before, ".new", b"content").expect("added");
        assert_eq!(section(&after, ".new"), Ok(Some(&b"content"[..])));
        assert_eq!(section(&before, ".new"), Ok(None));
        assert_eq!(section(&after, ".text"), section(&before, ".text"));
        assert_eq!(after[HEADER_BYTES..before.len()], before[HEADER_BYTES..]);
        assert_eq!(add_section(&after, ".new", b""), Err(ElfError::Duplicate));
        assert_eq!(add_section(&before, ".new", b"content"), Ok(after));
    }

    #[test]
    fn damage_is_refused() {
        assert_eq!(section(b"#!/bin/sh", ".x"), Err(ElfError::NotElf));
        let mut file = program();
        put(&mut file, E_SHOFF, &u64::MAX.to_le_bytes());
        assert_eq!(section(&file, ".x"), Err(ElfError::Malformed("section table")));
        let mut file = program();
        put(&mut file, E_SHSTRNDX, &0xfff0u16.to_le_bytes());
        assert_eq!(section(&file, ".x"), Err(ElfError::Malformed("table of names")));
    }
}
