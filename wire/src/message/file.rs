//! Messages between the outside and a capsule's guest daemon: files. Content travels as DATA on
//! channel 4.

use super::messages;
use crate::codec::Bytes;
use alloc::string::String;

/// DATA channel of a file's content, both ways.
pub const CHANNEL_FILE: u8 = 4;

/// `FileChange`: an entry was made, or moved in from outside.
pub const CHANGE_MADE: u8 = 1;
/// `FileChange`: a file was written to.
pub const CHANGE_WRITTEN: u8 = 2;
/// `FileChange`: an entry was removed, or moved out of what is watched.
pub const CHANGE_REMOVED: u8 = 3;
/// `FileChange`: an entry was moved within what is watched.
pub const CHANGE_MOVED: u8 = 4;
/// `FileChange`: an entry's permissions, owner or times changed.
pub const CHANGE_ATTRIBUTES: u8 = 5;
/// `FileChange`: changes were lost.
pub const CHANGES_LOST: u8 = 6;

messages! {
    /// Asks for a file's content. Answered by `FileEntry`, DATA and `Done`.
    FileRead = 0x0300 {
        /// Path; a relative one starts at the user's home.
        path: Bytes,
        /// Account to act for; empty for the capsule's default user.
        user: String,
        /// First byte.
        offset: u64,
        /// How many bytes; 0 for all that follow.
        length: u64,
    }

    /// Replaces a file's content with the DATA that follows, up to FIN, at once or not at all. Answered
    /// by `FileEntry`.
    FileWrite = 0x0301 {
        /// Path; a relative one starts at the user's home. Missing parents are made.
        path: Bytes,
        /// Account to act for; empty for the capsule's default user.
        user: String,
        /// Permission bits of a new file, such as 0o644.
        mode: u32,
    }

    /// Asks for one entry. Answered by `FileEntry`.
    FileStat = 0x0302 {
        /// Path; a relative one starts at the user's home.
        path: Bytes,
        /// Account to act for; empty for the capsule's default user.
        user: String,
    }

    /// Asks for a directory's entries. Answered by a `FileEntry` each and `Done`.
    FileList = 0x0303 {
        /// Path; a relative one starts at the user's home.
        path: Bytes,
        /// Account to act for; empty for the capsule's default user.
        user: String,
        /// How many levels down; 1 for the directory's own entries.
        depth: u32,
    }

    /// Makes a directory and its missing parents. Answered by `FileEntry`.
    FileMakeDirectory = 0x0304 {
        /// Path; a relative one starts at the user's home.
        path: Bytes,
        /// Account to act for; empty for the capsule's default user.
        user: String,
        /// Permission bits of new directories, such as 0o755.
        mode: u32,
    }

    /// Moves an entry. Answered by `FileEntry`.
    FileMove = 0x0305 {
        /// The old path.
        from: Bytes,
        /// The new path.
        to: Bytes,
        /// Account to act for; empty for the capsule's default user.
        user: String,
    }

    /// Removes an entry, a directory with all that is in it. Answered by `Done`.
    FileRemove = 0x0306 {
        /// Path; a relative one starts at the user's home.
        path: Bytes,
        /// Account to act for; empty for the capsule's default user.
        user: String,
    }

    /// One entry of a file system.
    FileEntry = 0x0310 {
        /// Absolute path.
        path: Bytes,
        /// `st_mode`: type and permission bits (inode(7)).
        mode: u32,
        /// Size in bytes.
        size: u64,
        /// Owner's account name, or its number where there is none.
        owner: String,
        /// Group's name, or its number where there is none.
        group: String,
        /// Time of the last change of content, in seconds since the epoch.
        modified_sec: i64,
        /// Where a symbolic link points; empty for other types.
        symlink_target: Bytes,
    }

    /// Watches a directory. Answered by `Done`, then a `FileChange` for each change until the stream ends.
    FileWatch = 0x0320 {
        /// Path; a relative one starts at the user's home.
        path: Bytes,
        /// Account to act for; empty for the capsule's default user.
        user: String,
        /// Whether directories beneath it are watched too, also those that are made later.
        recursive: bool,
    }

    /// Something changed in a watched directory.
    FileChange = 0x0321 {
        /// 1 made, 2 written to, 3 removed, 4 moved, 5 permissions or times changed, 6 changes were lost:
        /// list the directory again.
        change: u8,
        /// Absolute path of the entry; of the watched directory when changes were lost.
        path: Bytes,
        /// Where a moved entry was before; empty for other changes.
        from: Bytes,
        /// Whether the entry is a directory.
        is_directory: bool,
    }
}
