//! `/v1/capsules/{id}/files`: listing, directories, removal. Content goes through [`super::streams`].

use super::capsule_access::with_capsule;
use super::fields::{Fields, invalid};
use crate::http::context::Context;
use crate::http::handler::{Flow, HostCall, Request, Response, Step};
use serde_json::{Value, json};
use std::sync::Arc;
use wire::codec::Bytes;
use wire::message::{FileEntry, FileList, FileMakeDirectory, FileRemove};

/// How long a capsule may take to answer, in milliseconds.
const TIMEOUT_MS: u64 = 60_000;
/// The longest path, in bytes: Linux's `PATH_MAX` without its NUL.
const MAX_PATH: usize = 4095;
/// How deep a listing may go.
const MAX_DEPTH: i32 = 64;

// File types in `st_mode`: inode(7).
const S_IFMT: u32 = 0o170_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFLNK: u32 = 0o120_000;

fn path(fields: &Fields) -> Result<Bytes, Response> {
    let path = fields.required_text("path", MAX_PATH)?;
    if path.len() > MAX_PATH {
        return Err(invalid(&format!("path is longer than {MAX_PATH} bytes")));
    }
    Ok(path.into())
}

/// `-rwxr-xr-x`, as `ls -l` has it.
fn permissions(mode: u32) -> String {
    let kind = match mode & S_IFMT {
        S_IFDIR => 'd',
        S_IFLNK => 'l',
        0o010_000 => 'p',
        0o020_000 => 'c',
        0o060_000 => 'b',
        0o140_000 => 's',
        _ => '-',
    };
    let mut text = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 == 0 { '-' } else { 'r' });
        text.push(if bits & 2 == 0 { '-' } else { 'w' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// An entry, as the API tells it.
fn entry(entry: &FileEntry) -> Value {
    let path = entry.path.lossy();
    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    let kind = match entry.mode & S_IFMT {
        S_IFDIR => "directory",
        S_IFLNK => "symlink",
        _ => "file",
    };
    let target = (!entry.symlink_target.is_empty()).then(|| entry.symlink_target.lossy());
    json!({
        "name": if name.is_empty() { "/" } else { name },
        "path": path,
        "type": kind,
        "size": entry.size,
        "mode": entry.mode & 0o7777,
        "permissions": permissions(entry.mode),
        "owner": entry.owner,
        "group": entry.group,
        "modified_at": entry.modified_sec,
        "symlink_target": target,
    })
}

/// `POST /v1/capsules/{id}/files/list`.
pub fn list(request: Request, context: &Arc<Context>) -> Flow {
    let message = Fields::of(&request).and_then(|fields| {
        let depth = fields.integer("depth", 0..=MAX_DEPTH)?.unwrap_or(1);
        // Neither 0 nor 1 goes below the directory's own entries.
        Ok(FileList { path: path(&fields)?, user: String::new(), depth: depth.max(1).unsigned_abs() })
    });
    with_capsule(&request, context, move |target| {
        HostCall::forward(&target.host_id, &target.address, &target.capsule_id, &message?, TIMEOUT_MS).then(
            |result| {
                result?.answer(|reply| {
                    let entries: Vec<Value> = reply.all::<FileEntry>()?.iter().map(entry).collect();
                    Ok(Response::json(200, &json!({"entries": entries})))
                })
            },
        )
    })
}

/// `POST /v1/capsules/{id}/files/mkdir`.
pub fn make_directory(request: Request, context: &Arc<Context>) -> Flow {
    let message = Fields::of(&request)
        .and_then(|fields| Ok(FileMakeDirectory { path: path(&fields)?, user: String::new(), mode: 0o755 }));
    with_capsule(&request, context, move |target| {
        HostCall::forward(&target.host_id, &target.address, &target.capsule_id, &message?, TIMEOUT_MS).then(
            |result| {
                let made: FileEntry = result?.message()?;
                Step::respond(Response::json(200, &json!({"entry": entry(&made)})))
            },
        )
    })
}

/// `POST /v1/capsules/{id}/files/remove`.
pub fn remove(request: Request, context: &Arc<Context>) -> Flow {
    let message =
        Fields::of(&request).and_then(|fields| Ok(FileRemove { path: path(&fields)?, user: String::new() }));
    with_capsule(&request, context, move |target| {
        HostCall::forward(&target.host_id, &target.address, &target.capsule_id, &message?, TIMEOUT_MS).then(
            |result| {
                result?;
                Step::respond(Response::no_content())
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permissions_look_as_in_ls() {
        for (mode, text) in [
            (0o100_755, "-rwxr-xr-x"),
            (0o040_700, "drwx------"),
            (0o120_777, "lrwxrwxrwx"),
            (0o104_755, "-rwsr-xr-x"),
            (0o102_644, "-rw-r-Sr--"),
            (0o041_777, "drwxrwxrwt"),
        ] {
            assert_eq!(permissions(mode), text);
        }
    }

    #[test]
    fn an_entry_is_told_as_the_api_has_it() {
        let link = FileEntry {
            path: "/a/b".into(),
            mode: 0o120_777,
            size: 3,
            owner: "root".into(),
            group: "root".into(),
            modified_sec: 7,
            symlink_target: "c".into(),
        };
        assert_eq!(
            entry(&link),
            json!({"name": "b", "path": "/a/b", "type": "symlink", "size": 3, "mode": 0o777,
                   "permissions": "lrwxrwxrwx", "owner": "root", "group": "root", "modified_at": 7,
                   "symlink_target": "c"})
        );
        let root = FileEntry { path: "/".into(), mode: 0o040_755, ..FileEntry::default() };
        assert_eq!(entry(&root)["name"], "/");
        assert_eq!(entry(&root)["symlink_target"], Value::Null);
    }
}
