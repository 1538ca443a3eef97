//! The operators on NVIDIA GPUs; see [`cuda`](crate::cuda) for how tensors are passed.
//!
//! Each is one launch that needs nothing beside its arguments, so that a step can be [recorded](crate::cuda::record) once and
//! run as a graph.
//!
//! A product reads its matrix once for every 64 rows (fewer where these have more features than shared memory has room for, and
//! 4 of `f32`), as fast as memory gives it where the rows of both are contiguous, aligned to 16 bytes, and of a multiple of 8 features.
//! Other strides give the same bits, slower. Half types go through the tensor cores.

mod layers;

use std::ops::Range;
use std::sync::Arc;

use bytemuck::Zeroable;
use cudarc::driver::CudaStream;

pub use layers::join_layers;

use super::check::{LinearProblem, LinearSizes, UpdateProblem, UpdateSizes};
use super::{Columns, Linear, LinearMut, SelectiveUpdate, SelectiveUpdateMut};
use crate::cuda::params::decode::linear::{
    CHUNK, CHUNK_F32, F32_ROWS, OUTPUTS, PARTIAL_STRIDE, SLICE_BYTES, TILE_ROWS, WARPS,
};
use crate::cuda::params::decode::{self as kernels, linear, projected, update};
use crate::cuda::params::{self, QUAD};
use crate::cuda::{
    Arguments, Cuda, Device, GRID_COLUMNS, GRID_ROWS, Kernel, Module, Properties, grid_rows, is_vectorizable, or_null,
    storage, storage_mut, suffix,
};
use crate::pool::cuda::SlotList;
use crate::{DType, Element, Error, Result, View};

/// Multiplies on the stream's device, asynchronously.
///
/// # Errors
/// An argument that does not fit, see [`Linear`] and [`LinearMut`], or that lies on another device; nothing is written then.
/// What the driver refuses.
pub fn linear<X: Element, T: Element, O: Element, St: Element>(
    stream: &Arc<CudaStream>,
    inputs: &Linear<X, T, Cuda>,
    outputs: LinearMut<O, St, Cuda>,
) -> Result<()> {
    linear_checked(stream, &inputs.check()?, outputs)
}

/// [`linear`] of inputs that have been checked.
pub(crate) fn linear_checked<X: Element, T: Element, O: Element, St: Element>(
    stream: &Arc<CudaStream>,
    problem: &LinearProblem<X, T, Cuda>,
    outputs: LinearMut<O, St, Cuda>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    let (device, mut arguments) = (Device::new(stream)?, Arguments::new(stream));
    let out = arguments.write("out", outputs.out)?;
    let mut product = Product::new::<X, T, O>(&device, &mut arguments, problem, out)?;
    product.params.flags |= params::flags([(outputs.accumulate, kernels::FLAG_ACCUMULATE)]);
    let mut list = None;
    if let (Some(conv), Some(state)) = (&problem.inputs.conv, outputs.conv_state) {
        let params = &mut product.params;
        params.flags |= kernels::FLAG_CONV;
        params.conv_weight = arguments.view("conv.weight", &conv.weight)?.into();
        params.conv_bias = or_null(arguments.optional_view("conv.bias", &conv.bias)?);
        let (slots, storage_of_state) = (state.shape[0], storage_mut(&state));
        params.conv_state = arguments.pool("conv_state", state)?;
        params.state_type = params::type_code(St::DTYPE);
        let list = list.insert(SlotList::new(&device, &mut arguments, conv.slots, slots)?);
        product.slots = list.params;
        let bias = params.conv_bias.data;
        product.early.extend([
            storage(&conv.weight, params.conv_weight.data),
            conv.bias.as_ref().map_or(0..0, |view| storage(view, bias)),
            storage_of_state(params.conv_state.data),
            list.storage.clone(),
        ]);
    }
    product.launch::<T>(&device)
}

/// A product as its kernel takes it.
struct Product {
    params: kernels::Linear,
    /// Of the convolution's states.
    slots: params::Slots,
    sizes: LinearSizes,
    tile: Tile,
    /// Whether vectors are whole.
    is_whole: bool,
    /// Where what is read early lies: the matrix, the norm's weights, and what a convolution takes.
    early: Vec<Range<u64>>,
}

impl Product {
    /// That is written to `out`, whose elements are of type `O`. A convolution is left to be added.
    fn new<'a, X: Element, T: Element, O: Element>(
        device: &Device,
        arguments: &mut Arguments<'a>,
        problem: &LinearProblem<'a, X, T, Cuda>,
        out: u64,
    ) -> Result<Self> {
        let (inputs, sizes) = (&problem.inputs, problem.sizes);
        let LinearSizes { rows, features, out_features, conv: [d_inner, width] } = sizes;
        let weight = params::Rows::from(arguments.view("weight", &inputs.weight)?);
        let x = params::Rows::from(arguments.view("x", &inputs.x)?);
        let norm_weight = match &inputs.norm {
            Some(norm) => or_null(arguments.optional_view("norm.weight", &norm.weight)?),
            None => params::Vector::zeroed(),
        };
        let of_norm = |weight: View<f32, 1, Cuda>| storage(&weight, norm_weight.data);
        let of_norm = inputs.norm.and_then(|norm| norm.weight).map_or(0..0, of_norm);
        let bias: params::Vector = or_null(arguments.optional_view("bias", &inputs.bias)?);
        let of_bias = inputs.bias.as_ref().map_or(0..0, |view| storage(view, bias.data));
        let early = vec![storage(&inputs.weight, weight.data), of_norm, of_bias];
        let is_whole = [weight.column, x.column] == [1; 2]
            && features.is_multiple_of(8)
            && is_vectorizable::<T>(weight.data, &[weight.row], 16 / size_of::<T>())
            && is_vectorizable::<X>(x.data, &[x.row], 16 / size_of::<X>())
            && (norm_weight.data == 0
                || norm_weight.channel == 1 && is_vectorizable::<f32>(norm_weight.data, &[], QUAD));
        let tile = Tile::new::<T>(sizes, is_whole, size_of::<X>(), device.properties());
        let mut params = kernels::Linear {
            x,
            norm_weight,
            weight,
            bias,
            out,
            rows: rows as i64,
            features: features as i64,
            out_features: out_features as i64,
            x_type: params::type_code(X::DTYPE),
            out_type: params::type_code(O::DTYPE),
            slice: tile.slice as i64,
            partials: tile.partials as i64,
            squares: tile.squares as i64,
            flags: params::flags([
                (inputs.norm.is_some(), kernels::FLAG_NORM),
                (tile.has_own_columns, kernels::FLAG_OWN_COLUMNS),
                (tile.is_direct, kernels::FLAG_DIRECT),
            ]),
            count: features as f32,
            d_inner: d_inner as i64,
            width: width as i64,
            ..kernels::Linear::zeroed()
        };
        if let Some(norm) = &inputs.norm {
            params.eps = norm.eps as f32;
        }
        Ok(Self { params, slots: params::Slots::zeroed(), sizes, tile, is_whole, early })
    }

    fn launch<T: Element>(&self, device: &Device) -> Result<()> {
        let (tile, LinearSizes { rows, features, out_features, .. }) = (self.tile, self.sizes);
        if rows == 0 || out_features == 0 {
            return Ok(());
        }
        for (argument, size) in [("x", features), ("weight", out_features)] {
            // Kernels count features and columns by 32 bits, and go a little beyond.
            if size > GRID_COLUMNS / 2 {
                return Err(Error::argument(argument, format_args!("at most {} features", GRID_COLUMNS / 2), size));
            }
        }
        let grid = [tile.blocks, rows.div_ceil(tile.rows)];
        if grid[1] > GRID_ROWS {
            let expected = format_args!("at most {} rows", GRID_ROWS * tile.rows).to_string();
            return Err(Error::argument("x", expected, rows));
        }
        let mut kernel = Kernel::new(Module::DECODE_LINEAR, ["decode_linear", tile.variant, suffix(T::DTYPE)]);
        kernel.most_shared = device.properties().shared_memory;
        let call = kernels::LinearCall { linear: self.params, slots: self.slots };
        // SAFETY: every address and extent has been checked by `Linear::check` and `check_outputs`, slots on the device by the
        // kernel; each element of the output and of the states of a slot is written by one thread. (Where a caller has put a slot
        // on the device twice, two write one state: whatever they leave there is numbers of the state's type.)
        unsafe { device.launch_overlapping(&kernel, grid, linear::THREADS, tile.shared, &call, &self.early) }
    }
}

/// The part of a product that a block gives at a time, and how its rows are staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tile {
    rows: usize,
    variant: &'static str,
    /// Features that are staged at a time.
    slice: usize,
    /// Each warp has 16 columns of its own, as there are enough for all.
    has_own_columns: bool,
    /// A block's rows are multiplied with 16 columns alone, and need not be staged.
    is_direct: bool,
    /// Blocks along the columns.
    blocks: usize,
    /// Bytes of shared memory, and where in it the warps' sums and the squares of rows lie. What is read early comes last.
    shared: usize,
    partials: usize,
    squares: usize,
}

impl Tile {
    /// Whether all features of a tile are summed up at a time, by all warps.
    fn has_whole_sums(&self, sizes: LinearSizes) -> bool {
        self.slice >= sizes.features && !self.has_own_columns
    }

    /// Of the numbers of rows that shared memory has room for, the one with which a processor has least to read. How features are
    /// divided is no matter of rows, so that a row's sums have the same order in any company. `x_bytes`: of an element of the rows.
    fn new<T: Element>(sizes: LinearSizes, is_whole: bool, x_bytes: usize, device: Properties) -> Self {
        let is_f32 = T::DTYPE == DType::F32;
        let chunk = if is_f32 { CHUNK_F32 } else { CHUNK };
        let most = SLICE_BYTES / size_of::<T>() / chunk * chunk;
        // Equal slices, so that none is left over that keeps few warps busy.
        let slices = sizes.features.div_ceil(most);
        let slice = sizes.features.div_ceil(slices).next_multiple_of(chunk);
        let tiles = sizes.out_features.div_ceil(OUTPUTS);
        // It takes a few tiles for each warp that runs at a time, and all features at once.
        let has_own_columns = !is_f32 && slices == 1 && tiles >= 2 * WARPS * device.processors;
        // What a block gives at a time.
        let columns = if has_own_columns { OUTPUTS * WARPS } else { OUTPUTS };
        let parts = sizes.out_features.div_ceil(columns);
        // A tile, and the bytes that the busiest processor reads for each feature.
        let tile = |rows: usize, variant| {
            // Of f32, whose rows are not staged, nothing.
            let staged = if is_f32 { 0 } else { rows * slice * size_of::<T>() };
            let sums = WARPS * rows * PARTIAL_STRIDE * size_of::<f32>();
            // A processor has registers for two blocks of up to 32 rows, and for one of more; and memory.
            let at_a_time = if rows <= 32 { 2 } else { 1 };
            let running =
                device.processors * at_a_time.min((device.shared_memory / (staged + sums + rows * 32).max(1)).max(1));
            let row_blocks = sizes.rows.div_ceil(rows);
            // Blocks go from part to part, where more than run at a time would stage the rows once more.
            let blocks = parts.min((running / row_blocks).max(1));
            let each = parts.div_ceil(blocks.max(1));
            let partials = if each > 1 || has_own_columns { staged } else { 0 };
            let squares = staged.max(partials + sums);
            let staged_alone = squares + rows * WARPS * size_of::<f32>();
            // Of a convolution the states, taps and bias of each element, and of rows that are wider than the matrix, which may be
            // normed, the weights for that.
            let weights = if x_bytes > size_of::<T>() { slice } else { 0 };
            let early = if rows == TILE_ROWS { OUTPUTS * rows * 2 * sizes.conv[1] + weights } else { 0 };
            let with_early = staged_alone + early * size_of::<f32>();
            let is_direct = each == 1 && !has_own_columns && slices == 1 && with_early <= device.shared_memory;
            let shared = if is_direct { with_early } else { staged_alone };
            let read = rows.min(sizes.rows) * x_bytes + each * columns * size_of::<T>();
            let cost = (blocks * row_blocks).div_ceil(device.processors) * read;
            (cost, Self { rows, variant, slice, has_own_columns, is_direct, blocks, shared, partials, squares })
        };
        if is_f32 {
            return tile(F32_ROWS, if is_whole { "rows4" } else { "general" }).1;
        }
        if !is_whole {
            return tile(TILE_ROWS, "general").1;
        }
        let larger = [(16, "rows16"), (32, "rows32"), (64, "rows64")].into_iter();
        let larger = larger.filter(|(rows, _)| sizes.rows > rows / 2).map(|(rows, variant)| tile(rows, variant));
        let fitting = larger.filter(|(_, tile)| tile.shared <= device.shared_memory);
        let few = tile(TILE_ROWS, "rows8");
        fitting.fold(few, |best, next| if next.0 < best.0 { next } else { best }).1
    }
}

/// Runs the update on the stream's device, asynchronously.
///
/// Columns that are [projected](Columns::Projected) take no launch of their own where blocks can share what they compute (from
/// compute capability 9.0 on), types are half, there are few rows, `x_proj` is small (up to that of mamba-370m), and both matrices and the
/// states can be read in vectors. The bits are the same.
///
/// # Errors
/// An argument that does not fit, see [`SelectiveUpdate`] and [`SelectiveUpdateMut`], or that lies on another device; step
/// sizes of a rank that shared memory has no room for (some 50,000 on an H100). Nothing is written then. What the driver refuses.
pub fn selective_update<T: Element, St: Element>(
    stream: &Arc<CudaStream>,
    inputs: &SelectiveUpdate<T, Cuda>,
    outputs: SelectiveUpdateMut<T, St, Cuda>,
) -> Result<()> {
    selective_update_checked(stream, &inputs.check()?, outputs)
}

/// [`selective_update`] of inputs that have been checked.
pub(crate) fn selective_update_checked<T: Element, St: Element>(
    stream: &Arc<CudaStream>,
    problem: &UpdateProblem<T, Cuda>,
    outputs: SelectiveUpdateMut<T, St, Cuda>,
) -> Result<()> {
    problem.check_outputs(&outputs)?;
    let (device, mut arguments) = (Device::new(stream)?, Arguments::new(stream));
    let (inputs, UpdateSizes { rows, d_inner, d_state, dt_rank }) = (&problem.inputs, problem.sizes);
    // Whole vectors may be read where the last one is not.
    let shared = (dt_rank + 2 * d_state + QUAD) * size_of::<f32>();
    if shared > device.properties().shared_memory {
        let most = device.properties().shared_memory / size_of::<f32>() - 2 * d_state - QUAD;
        return Err(Error::argument("dt_weight", format_args!("a rank of at most {most} on this device"), dt_rank));
    }
    if d_inner > GRID_COLUMNS {
        return Err(Error::argument("u", format_args!("at most {GRID_COLUMNS} channels"), d_inner));
    }
    let (columns, product) = match (inputs.columns, outputs.columns) {
        (Columns::Projected { weight }, Some(columns)) => {
            let data = arguments.write("columns", columns)?;
            let product = Linear::new(inputs.u, weight).check()?;
            let product = Product::new::<T, T, T>(&device, &mut arguments, &product, data)?;
            (params::Rows { data, row: product.params.out_features, column: 1 }, Some(product))
        }
        (Columns::Given(view), _) => (arguments.view("columns", &view)?.into(), None),
        (Columns::Projected { .. }, None) => unreachable!("`check_outputs` has found the buffer"),
    };
    let (slots, storage_of_state) = (outputs.state.shape[0], storage_mut(&outputs.state));
    let mut params = kernels::Update {
        u: arguments.view("u", &inputs.u)?.into(),
        z: or_null(arguments.optional_view("z", &inputs.z)?),
        columns,
        dt_weight: arguments.view("dt_weight", &inputs.dt_weight)?.into(),
        a: arguments.view("a", &inputs.a)?.into(),
        d: or_null(arguments.optional_view("d", &inputs.d)?),
        delta_bias: or_null(arguments.optional_view("delta_bias", &inputs.delta_bias)?),
        state: arguments.pool("state", outputs.state)?,
        out: arguments.write("out", outputs.out)?,
        rows: rows as i64,
        d_inner: d_inner as i64,
        d_state: d_state as i64,
        dt_rank: dt_rank as i64,
        part_shift: d_state.div_ceil(QUAD).next_power_of_two().min(32).ilog2().into(),
        ..kernels::Update::zeroed()
    };
    if let Some(norms) = &inputs.norms {
        (params.dt_eps, params.state_eps) = (norms.eps as f32, norms.eps as f32);
        if let Some([dt, b, c]) = &norms.weights {
            params.dt_norm = arguments.view("norms.weights[0]", dt)?.into();
            params.b_norm = arguments.view("norms.weights[1]", b)?.into();
            params.c_norm = arguments.view("norms.weights[2]", c)?.into();
        }
    }
    let is_whole = d_state.is_multiple_of(QUAD)
        && dt_rank.is_multiple_of(QUAD)
        && [params.a.state, params.state.column, params.dt_weight.column] == [1; 3]
        && is_vectorizable::<f32>(params.a.data, &[params.a.channel], QUAD)
        && is_vectorizable::<St>(params.state.data, &[params.state.slot, params.state.row], QUAD)
        && is_vectorizable::<T>(params.dt_weight.data, &[params.dt_weight.row], QUAD);
    params.flags = params::flags([(is_whole, update::FLAG_VECTOR), (inputs.norms.is_some(), update::FLAG_NORMS)]);
    let list = SlotList::new(&device, &mut arguments, inputs.slots, slots)?;
    if rows == 0 {
        return Ok(());
    }
    let of_vector =
        |vector: &Option<View<f32, 1, Cuda>>, data| vector.as_ref().map_or(0..0, |view| storage(view, data));
    let early = [
        storage(&inputs.dt_weight, params.dt_weight.data),
        storage(&inputs.a, params.a.data),
        of_vector(&inputs.d, params.d.data),
        of_vector(&inputs.delta_bias, params.delta_bias.data),
        storage_of_state(params.state.data),
        list.storage.clone(),
    ];
    let update = Update { params, slots: list.params, early, is_whole, sizes: problem.sizes, shared };
    match product {
        Some(product) if update.joins::<T, St>(&device, &product)? => update.launch_with::<T, St>(&device, product),
        product => {
            if let Some(product) = product {
                product.launch::<T>(&device)?;
            }
            update.launch::<T, St>(&device)
        }
    }
}

/// Lanes that keep a processor busy, one for a channel's states; and how many blocks run on it at a time.
const LANES: usize = 256;
const BLOCKS: usize = 3;
const PARTS_SHIFT: i64 = update::PARTS_SHIFT as i64;

/// An update as its kernels take it, of at least one row.
struct Update {
    params: kernels::Update,
    slots: params::Slots,
    sizes: UpdateSizes,
    /// Whether vectors are whole.
    is_whole: bool,
    /// Where what is read early lies.
    early: [Range<u64>; 6],
    /// Bytes of shared memory by itself.
    shared: usize,
}

impl Update {
    /// By columns that are there.
    fn launch<T: Element, St: Element>(mut self, device: &Device) -> Result<()> {
        let (rows, properties) = (self.sizes.rows, device.properties());
        let many = self.plan_many::<T, St>(properties);
        let (grid, shared) = match &many {
            Some(many) => {
                self.params.flags |= update::FLAG_PARTS;
                (self.params.weights, self.params.states) = (many.weights as i64, many.states as i64);
                (many.grid, many.shared)
            }
            None => (self.grid(self.params.part_shift, rows, BLOCKS * properties.processors), self.shared),
        };
        let mut kernel = Kernel::new(Module::DECODE_UPDATE, ["decode_update", suffix(T::DTYPE), suffix(St::DTYPE)]);
        kernel.most_shared = properties.shared_memory;
        let call = kernels::UpdateCall { update: self.params, slots: self.slots };
        // SAFETY: every address and extent has been checked by `SelectiveUpdate::check` and `check_outputs`, slots on the device
        // by the kernel; each state and output is written by one thread. (Of a slot that stands on the device twice, see `linear`.)
        unsafe { device.launch_overlapping(&kernel, grid, update::THREADS, shared, &call, &self.early) }
    }

    /// The grid whose lanes share a channel by `lane_shift`, of few blocks: what is the channel's is read once for all rows of a block, which
    /// takes `rows` of them, or groups, one after another.
    fn grid(&self, lane_shift: i64, rows: usize, room: usize) -> [usize; 2] {
        let columns = self.sizes.d_inner.div_ceil(update::THREADS >> lane_shift);
        [columns, grid_rows(columns, rows, room)]
    }

    /// How many rows are updated, if lanes can have several parts of a channel, which saves exchanges and what is done once for a channel, but
    /// leaves a row few lanes: where there are rows enough, what warps copy lies together, and a processor has room for two blocks at
    /// least.
    fn plan_many<T: Element, St: Element>(&self, device: Properties) -> Option<ManyRows> {
        let kernels::Update { state, part_shift, .. } = &self.params;
        let UpdateSizes { rows, d_inner, d_state, dt_rank } = self.sizes;
        let fits = self.is_whole
            && *part_shift >= PARTS_SHIFT
            && d_state == QUAD << part_shift
            && state.row == d_state as i64
            && is_vectorizable::<St>(state.data, &[state.slot], 16 / size_of::<St>());
        if !fits {
            return None;
        }
        let lane_shift = part_shift - PARTS_SHIFT;
        if (rows * d_inner) << lane_shift < LANES * device.processors {
            return None;
        }
        let (warps, groups) = (update::THREADS / 32, rows.div_ceil(update::ROWS));
        let columns = warps * update::ROWS * (dt_rank + 2 * d_state) * size_of::<f32>();
        let weights = columns.next_multiple_of(16);
        let of_weights = dt_rank * ((update::THREADS >> lane_shift) + 1) * size_of::<T>();
        let states = (weights + of_weights).next_multiple_of(16);
        let of_row = 32 * update::PARTS * QUAD * size_of::<St>() + update::STAGED_PADDING;
        [BLOCKS, 2].into_iter().find_map(|blocks| {
            let grid = self.grid(lane_shift, groups, blocks * device.processors);
            // Where all groups run at once, none has its states asked for while another is gone through.
            let stages = groups.div_ceil(grid[1]).min(update::STAGES);
            let shared = states + stages * update::ROWS * warps * of_row;
            let has_room = shared <= device.shared_memory && device.blocks_by_shared_memory(shared) >= blocks;
            has_room.then_some(ManyRows { grid, shared, weights, states })
        })
    }

    /// The kernel that computes the columns too.
    fn joined_kernel<T: Element, St: Element>(device: &Device) -> Kernel {
        let name = ["decode_projected", suffix(T::DTYPE), suffix(St::DTYPE)];
        Kernel { most_shared: device.properties().shared_memory, ..Kernel::new(Module::DECODE_PROJECTED, name) }
    }

    /// Bytes of shared memory with the product that gives the columns.
    fn joined_shared(&self) -> usize {
        let UpdateSizes { d_state, dt_rank, .. } = self.sizes;
        let columns = (dt_rank + 2 * d_state).next_multiple_of(QUAD);
        projected::ROWS * (WARPS * PARTIAL_STRIDE + columns) * size_of::<f32>()
    }

    /// Whether one kernel can compute the columns too, with the bits that they have by themselves.
    fn joins<T: Element, St: Element>(&self, device: &Device, product: &Product) -> Result<bool> {
        let LinearSizes { features, out_features, .. } = product.sizes;
        let of_block = out_features.div_ceil(OUTPUTS * projected::CLUSTER) * OUTPUTS * features * size_of::<T>();
        Ok(T::DTYPE != DType::F32
            && self.is_whole
            && product.is_whole
            && product.tile.has_whole_sums(product.sizes)
            && self.sizes.rows <= MOST_JOINED_ROWS
            && of_block <= MOST_JOINED_BYTES
            && self.joined_shared() <= device.properties().shared_memory
            && device.is_compiled_for(&Self::joined_kernel::<T, St>(device), CLUSTERS)?)
    }

    /// With the product that gives the columns.
    fn launch_with<T: Element, St: Element>(self, device: &Device, product: Product) -> Result<()> {
        let UpdateSizes { rows, d_inner, .. } = self.sizes;
        let blocks =
            d_inner.div_ceil(projected::THREADS >> self.params.part_shift).next_multiple_of(projected::CLUSTER);
        let grid = [blocks, rows.div_ceil(projected::ROWS)];
        let (kernel, shared) = (Self::joined_kernel::<T, St>(device), self.joined_shared());
        let early = [&product.early[..], &self.early].concat();
        let params = kernels::ProjectedCall { project: product.params, update: self.params, slots: self.slots };
        // SAFETY: as `launch`, and as `linear` of the columns, each of which one thread writes.
        unsafe { device.launch_overlapping(&kernel, grid, projected::THREADS, shared, &params, &early) }
    }
}

/// An update of many rows: its grid, the shared memory of a block, and where in it projections and states are staged.
struct ManyRows {
    grid: [usize; 2],
    shared: usize,
    weights: usize,
    states: usize,
}

/// The compute capability, as the driver numbers them, from which on there are clusters of blocks.
const CLUSTERS: i32 = 90;

/// Up to so many rows, and bytes of a block's columns of x_proj, one kernel is faster than two: every cluster reads all of the matrix, each
/// block its columns, for eight rows. (See tuning.md.)
const MOST_JOINED_ROWS: usize = 8;
const MOST_JOINED_BYTES: usize = 65_536;

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// The tiles of products on devices with 227 KB and with 99 KB of shared memory.
    #[test]
    fn tiles() {
        let tile = |rows, features, out_features, x_bytes, shared_memory| {
            let sizes = LinearSizes { rows, features, out_features, conv: [0, 0] };
            Tile::new::<bf16>(sizes, true, x_bytes, Properties { processors: 132, shared_memory })
        };
        let staging = |rows, features, shared_memory| {
            let Tile { rows, slice, shared, .. } = tile(rows, features, 16, 2, shared_memory);
            (rows, slice, shared)
        };
        assert_eq!(staging(1, 768, 232_448), (8, 768, 12_544));
        // Eight blocks of 8 rows, as there is one tile of columns alone.
        assert_eq!(staging(64, 768, 101_376), (8, 768, 12_544));
        // Rows of f32 may be normed, by weights that are read early: for those there is no room where eight rows fill the memory.
        let of_f32 = |features, shared_memory| {
            let Tile { is_direct, shared, .. } = tile(1, features, 16, 4, shared_memory);
            (is_direct, shared)
        };
        assert_eq!(of_f32(768, 232_448), (true, 12_544 + 3072));
        assert_eq!(of_f32(6144, 232_448), (true, 98_560 + 24_576));
        assert_eq!(of_f32(6144, 101_376), (false, 98_560));
        // Two slices of a row, as many as on a device with more memory.
        assert_eq!(staging(64, 8192, 101_376), (8, 4096, 65_792));
        assert_eq!(staging(8, 100, 101_376), (8, 128, 5_376));
        let sizes = LinearSizes { rows: 9, features: 4096, out_features: 16, conv: [0, 0] };
        let device = Properties { processors: 132, shared_memory: 101_376 };
        let Tile { rows, slice, shared, .. } = Tile::new::<f32>(sizes, true, 4, device);
        assert_eq!((rows, slice, shared), (4, 2048, 2_688));
        // As many rows to a block as leave each processor least to read.
        let division = |rows, features, out_features, x_bytes| {
            let Tile { rows, has_own_columns, blocks, .. } = tile(rows, features, out_features, x_bytes, 232_448);
            (rows, has_own_columns, blocks)
        };
        assert_eq!(division(1, 768, 3072, 4), (8, false, 192));
        assert_eq!(division(64, 768, 3072, 4), (16, false, 66));
        assert_eq!(division(64, 1536, 768, 2), (32, false, 48));
        assert_eq!(division(64, 1536, 80, 2), (8, false, 5));
        // A head: each warp has its own columns, whatever the number of rows.
        assert_eq!(division(1, 768, 50_280, 4), (8, true, 264));
        assert_eq!(division(64, 768, 50_280, 4), (64, true, 132));
        assert_eq!(tile(64, 768, 50_280, 4, 101_376).rows, 32);
    }

    /// Which updates have many rows, and what a block of them takes: of bf16 and states of f32.
    #[test]
    fn many_rows() {
        let plan = |[rows, d_inner, d_state, dt_rank]: [usize; 4], shared_memory| {
            let part_shift = d_state.div_ceil(QUAD).next_power_of_two().min(32).ilog2().into();
            let state = params::Pool { data: 0, slot: (d_inner * d_state) as i64, row: d_state as i64, column: 1 };
            let update = Update {
                params: kernels::Update { state, part_shift, ..kernels::Update::zeroed() },
                slots: params::Slots::zeroed(),
                early: std::array::from_fn(|_| 0..0),
                is_whole: true,
                sizes: UpdateSizes { rows, d_inner, d_state, dt_rank },
                shared: 0,
            };
            update
                .plan_many::<bf16, f32>(Properties { processors: 132, shared_memory })
                .map(|many| (many.grid, many.shared))
        };
        // mamba-130m: all pairs of rows at once, three blocks to a processor. Columns, projections, and states of two rows of four warps.
        let [columns, projections, states] = [4 * 2 * 80 * 4, 48 * 129 * 2, 2 * 4 * 2176];
        assert_eq!(plan([64, 1536, 16, 48], 232_448), Some(([12, 32], columns + projections + states)));
        // One row after another would keep too few lanes busy; of states that no whole number of lanes has, or not all at once, there is no such way.
        for sizes in [[16, 1536, 16, 48], [64, 1536, 20, 48], [64, 1536, 256, 48]] {
            assert_eq!(plan(sizes, 232_448), None, "{sizes:?}");
        }
        // mamba-2.8b: two blocks to a processor, which take further rows and ask for their states ahead.
        let [columns, projections, states] = [4 * 2 * 192 * 4, 160 * 129 * 2, 2 * 2 * 4 * 2176];
        assert_eq!(plan([64, 5120, 16, 160], 232_448), Some(([40, 7], columns + projections + states)));
        assert_eq!(plan([64, 5120, 16, 160], 101_376), None);
    }
}
