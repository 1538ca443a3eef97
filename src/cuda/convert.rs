//! Many tensors brought into another type, or zeroed, at once.

use bytemuck::Zeroable;

use super::entries::{launches, place};
use super::params::{self, MOST_CONVERSIONS, convert};
use super::{Device, Kernel, Module};
use crate::Result;

/// Enqueues conversions of contiguous elements, in as few launches as there is room for all in. Their first blocks are set here.
///
/// # Safety
/// Each conversion's addresses must hold `count` elements of its types, and no two may write to one place or read what another
/// writes.
pub(crate) unsafe fn convert_all(device: &Device, conversions: &[params::Conversion]) -> Result<()> {
    let there = conversions.iter().filter(|conversion| conversion.count > 0);
    let entries: Vec<_> = there.map(|conversion| (conversion.count as usize, *conversion)).collect();
    let kernel = Kernel::new(Module::CONVERT, ["convert_all"]);
    for (part, grid) in launches(&entries, convert::CHUNK, MOST_CONVERSIONS) {
        let mut params = params::Conversions::zeroed();
        params.count = part.len() as i64;
        place(&mut params.conversions, part, convert::CHUNK, |entry, first_block| params::Conversion {
            first_block: first_block as i64,
            ..entry
        });
        // SAFETY: as the caller promises.
        unsafe { device.launch(&kernel, [grid, 1], convert::THREADS, 0, &params) }?;
    }
    Ok(())
}
