//! Packing the memory of a capsule that has been paused for long: compressed, it takes a fraction of the
//! space, and the disk stays as it is.
//!
//! The packed memory is on disk before the record names it, and what it was made of is removed after that: a
//! power cut leaves one or the other, whole. Going on, the memory is unpacked to the place where it was; the
//! record names the packed one until the machine has taken it.

use super::Capsule;
use super::executor::CapsuleReport;
use super::journal::{Phase, Step};
use super::lifecycle::Event;
use super::record::Record;
use super::saving::SaveFailure;
use crate::context::Context;
use crate::vmm::image::clean;
use crate::vmm::{Image, VmmError};
use crate::zstd::{self, ZstdError};
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What came of packing.
#[derive(Debug)]
pub struct PackReport {
    record: Record,
    result: Result<(), SaveFailure>,
    /// Space that the image took before and takes now, in bytes.
    bytes: (u64, u64),
    took_ms: u128,
}

impl Capsule {
    pub(super) fn begin_packing(&mut self, ctx: &Context) {
        self.stop_packing.store(false, Ordering::Relaxed);
        let (record, directory) = (self.record.clone(), self.directory.clone());
        let stop = Arc::clone(&self.stop_packing);
        self.submit(ctx, move || CapsuleReport::Packed(Box::new(pack(record, &directory, &stop))));
    }

    /// Its memory is not to be packed any further; that it is not is told as ever.
    pub fn stop_packing(&self) {
        self.stop_packing.store(true, Ordering::Relaxed);
    }

    pub(super) fn on_packed(&mut self, report: PackReport) -> Event {
        let PackReport { record, result, bytes: (before, after), took_ms } = report;
        self.record = record;
        match result {
            Ok(()) => {
                let (before, after) = (before / 1024, after / 1024);
                log::info!(
                    "capsule {}: hibernates, {after} KiB instead of {before} after {took_ms} ms",
                    self.spec.id
                );
                Event::Packed
            }
            Err(SaveFailure::Zstd(ZstdError::Stopped)) => Event::NotPacked,
            Err(e) => {
                log::warn!("capsule {}: not packed, it stays paused: {e}", self.spec.id);
                Event::NotPacked
            }
        }
    }
}

/// Packs the memory of a paused capsule and records that. Blocks.
fn pack(mut record: Record, directory: &Path, stop: &AtomicBool) -> PackReport {
    let began = Instant::now();
    let allocated = |record: &Record| record.image.map_or(0, |image| image.allocated_bytes(directory));
    let before = allocated(&record);
    let result = try_to_pack(&mut record, directory, stop);
    let bytes = (before, allocated(&record));
    PackReport { record, result, bytes, took_ms: began.elapsed().as_millis() }
}

fn try_to_pack(record: &mut Record, directory: &Path, stop: &AtomicBool) -> Result<(), SaveFailure> {
    let image = record.image.ok_or(SaveFailure::NoImage)?;
    let merged = image.merge(directory).map_err(SaveFailure::Vmm)?;
    let (from, to) = (merged.memory_path(directory), merged.packed_path(directory));
    record.note(directory, Step::Pack, Phase::Begin).map_err(SaveFailure::Record)?;
    zstd::compress(&from, &to, record.uid, stop).map_err(SaveFailure::Zstd)?;
    // Its name as well: what it was made of goes after this.
    let synced = File::open(directory).and_then(|handle| handle.sync_all());
    synced.map_err(|e| SaveFailure::Disk(to, e))?;
    let packed = Record { image: Some(Image { packed: true, ..merged }), base: None, ..record.clone() };
    // Where this fails nobody knows which of the two is on disk: both stay.
    packed.note(directory, Step::Pack, Phase::Done).map_err(SaveFailure::Record)?;
    *record = packed;
    clean(directory, record.image.as_ref(), None);
    Ok(())
}

/// Unpacks the memory of an image, where it is packed, to where a machine takes it from. Blocks.
pub(super) fn unpack(image: &Image, record: &Record, directory: &Path) -> Result<(), SaveFailure> {
    if !image.packed {
        return Ok(());
    }
    let (from, to) = (image.packed_path(directory), image.memory_path(directory));
    zstd::decompress(&from, &to, record.uid).map_err(SaveFailure::Zstd)?;
    let bytes = fs::metadata(&to).map_or(0, |metadata| metadata.len());
    if bytes != u64::from(record.memory_mb) << 20 {
        let what = "what is packed in it is not the whole memory";
        return Err(SaveFailure::Vmm(VmmError::BadImage { path: from, what }));
    }
    Ok(())
}
