//! Whole layers of Mamba in one launch.

use bytemuck::Zeroable;
use half::{bf16, f16};

use super::kernels::layers::{
    BATCH, CHUNK_BYTES, IN_PROJ, MATRICES, MOST_ROWS, OF_COLUMNS, OF_ROWS, OF_U, OF_Y, OF_Z, OUT_PROJ, PACE, PARTS,
    THREADS, WARPS, WORKERS, X_PROJ,
};
use super::kernels::linear::{CHUNK, OUTPUTS, PARTIAL_STRIDE};
use super::kernels::{self, FLAG_ACCUMULATE, FLAG_CONV, FLAG_NORM, FLAG_OWN_COLUMNS, update};
use crate::Result;
use crate::cuda::params::{self, TYPE_BF16, TYPE_F16, TYPE_F32, TensorMap};
use crate::cuda::{Context, Kernel, Launch, Module, Properties, Recording, Table};

/// Joins the launches of layers of Mamba that follow one another in a recording: each of them a [`linear`](super::linear) with a norm
/// and a convolution of rows of `f32`, a [`selective_update`](super::selective_update) of
/// [projected](crate::decode::Columns::Projected) columns with a gate, and a `linear` that adds to the rows. One launch then does the
/// work of all, with the same bits, and reads the matrices without a stop: what is multiplied next is on its way while blocks look for
/// what others have computed.
///
/// It takes 1, 2 or 4 rows, as far as shared memory and threads suffice (4 of mamba-1.4b, 2 of 2.8b on an H100); layers of one shape, of
/// up to 64 states, without norms of columns, that use the same buffers for what they pass on; matrices of half types, of at least
/// 16 MiB for each layer, of a multiple of 32 features, up to 6,144 of them, and of 16 columns; and a device of compute capability
/// 9.0 or later, with nothing else on it that would not end. What does not fit stays as it is.
///
/// # Errors
/// What the driver refuses.
pub fn join_layers(recording: Recording) -> Result<Recording> {
    let properties = Context::of(recording.context())?.properties;
    join(recording, properties, LEAST_BYTES)
}

/// Bytes of a layer's matrices from which on one launch is faster than three or four: of fewer, nothing is gained by reading them ahead,
/// and blocks find what others leave later than a launch begins. (See tuning.md.)
const LEAST_BYTES: i64 = 16 << 20;

fn join(recording: Recording, properties: Properties, least_bytes: i64) -> Result<Recording> {
    let context = Context::of(recording.context())?;
    let (mut launches, mut tables) = (Vec::new(), Vec::new());
    let mut rest = recording.launches();
    while let Some(first) = rest.first() {
        let Some(run) = Run::at(rest) else {
            launches.push(first.clone());
            rest = &rest[1..];
            continue;
        };
        let (of_run, after) = rest.split_at(run.launches);
        rest = after;
        let plan = Plan::new(&run.shape, properties).filter(|_| run.shape.bytes() >= least_bytes);
        match plan.and_then(|plan| Some((plan, run.maps()?))) {
            Some((plan, maps)) => {
                let (launch, of_launch) = run.joined(&recording, context, &plan, &maps)?;
                launches.push(launch);
                tables.extend(of_launch);
            }
            None => launches.extend_from_slice(of_run),
        }
    }
    Ok(recording.with(launches, tables))
}

/// What all layers that are joined have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    rows: i64,
    /// Columns and features of each matrix.
    matrices: [[i64; 2]; MATRICES],
    d_inner: i64,
    d_state: i64,
    dt_rank: i64,
    /// Where the rows lie, and what `in_proj`, `x_proj` and the update give.
    buffers: [u64; 4],
    /// The types of the matrices and of the states, as kernels are named.
    types: [&'static str; 2],
}

impl Shape {
    /// Of the matrices, which are of halves.
    fn bytes(&self) -> i64 {
        self.matrices.iter().map(|[columns, features]| columns * features * 2).sum()
    }
}

/// A layer as a recording has it.
struct Found {
    layer: kernels::Layer,
    shape: Shape,
    slots: params::Slots,
    launches: usize,
}

/// Layers that follow one another.
struct Run {
    layers: Vec<kernels::Layer>,
    shape: Shape,
    slots: params::Slots,
    launches: usize,
}

impl Run {
    /// Those at the beginning of some launches, if there are any.
    fn at(launches: &[Launch]) -> Option<Self> {
        let Found { layer, shape, slots, launches: len } = Found::at(launches)?;
        let mut run = Self { layers: vec![layer], shape, slots, launches: len };
        while let Some(next) = Found::at(&launches[run.launches..]) {
            if next.shape != shape || !are_same(&next.slots, &slots) {
                break;
            }
            run.layers.push(next.layer);
            run.launches += next.launches;
        }
        Some(run)
    }

    /// How the copy engine finds the chunks of each layer's matrices; none if it cannot.
    fn maps(&self) -> Option<Vec<TensorMap>> {
        let boxes = if self.shape.types[0] == "f16" { TensorMap::new::<f16> } else { TensorMap::new::<bf16> };
        let products = self.layers.iter().flat_map(|layer| [&layer.in_proj, &layer.project, &layer.out_proj]);
        let map = |p: &kernels::Linear| {
            // Chunks, of all columns.
            let extents = [p.features as usize / CHUNK, p.out_features as usize, CHUNK];
            boxes(p.weight.data, extents, [CHUNK as i64, p.weight.row], [BATCH, OUTPUTS, CHUNK])
        };
        products.map(map).collect()
    }

    /// The words of each part of what blocks leave to each other in a layer.
    fn parts(&self) -> [usize; PARTS] {
        let Shape { rows, matrices, d_inner, .. } = self.shape;
        let mut parts = [0; PARTS];
        (parts[OF_ROWS], parts[OF_COLUMNS]) = (rows * matrices[IN_PROJ][1], rows * matrices[X_PROJ][0]);
        for halves in [OF_U, OF_Z, OF_Y] {
            parts[halves] = rows * d_inner / 2;
        }
        parts.map(|words| words as usize)
    }

    /// The launch that takes their place, and what it reads.
    fn joined(
        &self,
        recording: &Recording,
        context: &Context,
        plan: &Plan,
        maps: &[TensorMap],
    ) -> Result<(Launch, [Table; 3])> {
        let parts = self.parts();
        let of_layer = parts.iter().sum::<usize>();
        let mut part_at = [0; PARTS];
        for part in 1..PARTS {
            part_at[part] = part_at[part - 1] + parts[part - 1] as i64;
        }
        let layers = recording.upload(bytemuck::cast_slice(&self.layers))?;
        let maps = recording.upload(bytemuck::cast_slice(maps))?;
        // The number of launches comes after what blocks leave to each other.
        let words = recording.upload(&vec![0; self.layers.len() * of_layer + 1])?;
        let call = kernels::LayersCall {
            layers: layers.address(),
            maps: maps.address(),
            words: words.address(),
            of_layer: of_layer as i64,
            part_at,
            launches: words.address() + (self.layers.len() * of_layer * size_of::<u64>()) as u64,
            ..self.call(plan)
        };
        let [of_t, of_state] = self.shape.types;
        let mut kernel = Kernel::new(Module::DECODE_LAYERS, ["decode_layers", of_t, of_state]);
        kernel.most_shared = context.properties.shared_memory;
        let grid = [plan.blocks, 1];
        // SAFETY: each launch that is joined was of checked arguments, and this does what they do, in their order; what it reads
        // ahead of its turn none of the launches before writes (they overlap). The recording keeps the tables.
        let launch = unsafe { Launch::cooperative(context, &kernel, grid, THREADS, plan.shared, &call) }?;
        Ok((launch, [layers, maps, words]))
    }

    /// Without what lies on the device.
    fn call(&self, plan: &Plan) -> kernels::LayersCall {
        let tiles = self.shape.matrices.map(|[columns, _]| columns / OUTPUTS as i64);
        let chunks = self.shape.matrices.map(|[_, features]| features / CHUNK as i64);
        let [rows, norm_weights, squares, partials, columns, described, arrivals] = plan.places.map(|at| at as i64);
        kernels::LayersCall {
            count: self.layers.len() as i64,
            tiles,
            chunks,
            rows,
            norm_weights,
            squares,
            partials,
            columns,
            described,
            arrivals,
            batches: plan.batches as i64,
            row_shift: self.shape.rows.ilog2().into(),
            row_bytes: plan.row_bytes as i64,
            most_tiles: plan.most_tiles as i64,
            slots: self.slots,
            ..kernels::LayersCall::zeroed()
        }
    }
}

/// A product of few rows with a whole matrix, whose features are summed up at once; `None` for another launch.
fn product(launch: &Launch) -> Option<(&'static str, kernels::LinearCall)> {
    let ["decode_linear", "rows8", of_t, _] = launch.kernel().name else { return None };
    let call: kernels::LinearCall = launch.params()?;
    (launch.overlaps() && is_of_whole_tiles(&call.linear)).then_some((of_t, call))
}

/// Whether a matrix is one of whole tiles and chunks, and all features are summed up at once.
fn is_of_whole_tiles(p: &kernels::Linear) -> bool {
    p.flags & FLAG_OWN_COLUMNS == 0
        && p.slice >= p.features
        && p.features % CHUNK as i64 == 0
        && p.out_features % OUTPUTS as i64 == 0
}

impl Found {
    /// The layer that some launches begin with.
    fn at(launches: &[Launch]) -> Option<Self> {
        let [first, second, ..] = launches else { return None };
        let (of_t, kernels::LinearCall { linear: in_proj, slots }) = product(first)?;
        // x_proj and the update are one launch, or two.
        let (of_x_proj, project, update, update_slots, of_state, len) = match second.kernel().name {
            ["decode_projected", of_t, of_state, _] if second.overlaps() => {
                let call: kernels::ProjectedCall = second.params()?;
                (of_t, call.project, call.update, call.slots, of_state, 2)
            }
            _ => {
                let (of_t, kernels::LinearCall { linear, .. }) = product(second)?;
                let third = launches.get(2)?;
                let ["decode_update", of_update, of_state, _] = third.kernel().name else { return None };
                let kernels::UpdateCall { update, slots } = third.params()?;
                if !third.overlaps() || of_update != of_t {
                    return None;
                }
                (of_t, linear, update, slots, of_state, 3)
            }
        };
        let (of_out_proj, kernels::LinearCall { linear: out_proj, .. }) = product(launches.get(len)?)?;
        let (of_type, rows, d_inner) = (type_code(of_t), in_proj.rows, update.d_inner);
        let kinds = |p: &kernels::Linear| p.flags & (FLAG_NORM | FLAG_CONV | FLAG_ACCUMULATE);
        let are_of_kinds = [kinds(&in_proj), kinds(&project), kinds(&out_proj)]
            == [FLAG_NORM | FLAG_CONV, 0, FLAG_ACCUMULATE]
            && [in_proj.x_type, project.x_type, out_proj.x_type] == [TYPE_F32, of_type, of_type]
            && [in_proj.out_type, project.out_type, out_proj.out_type] == [of_type, of_type, TYPE_F32]
            && [of_x_proj, of_out_proj] == [of_t; 2]
            && in_proj.state_type == type_code(of_state)
            && in_proj.norm_weight.data != 0
            && update.flags & (update::FLAG_VECTOR | update::FLAG_NORMS) == update::FLAG_VECTOR;
        let are_of_sizes = (1..=MOST_ROWS as i64).contains(&rows)
            && (rows as u64).is_power_of_two()
            && [project.rows, update.rows, out_proj.rows] == [rows; 3]
            && is_of_whole_tiles(&project)
            // A pair of a warp's channels goes together: it has two at least.
            && update.part_shift < 5
            && d_inner % CHUNK as i64 == 0
            && in_proj.d_inner == d_inner
            && in_proj.out_features == 2 * d_inner
            && in_proj.features == out_proj.out_features
            && [project.features, out_proj.features] == [d_inner; 2]
            && project.out_features == update.dt_rank + 2 * update.d_state
            && are_same(&slots, &update_slots);
        // What each gives is what the next ones take.
        let gate = in_proj.out + (d_inner as usize * size_of::<u16>()) as u64;
        let are_linked = are_columns(&update.u, in_proj.out, in_proj.out_features)
            && are_columns(&project.x, in_proj.out, in_proj.out_features)
            && are_columns(&update.z, gate, in_proj.out_features)
            && are_columns(&update.columns, project.out, project.out_features)
            && are_columns(&out_proj.x, update.out, d_inner)
            && are_columns(&in_proj.x, out_proj.out, out_proj.out_features);
        let is_layer = are_of_kinds && are_of_sizes && are_linked;
        if !is_layer {
            return None;
        }
        let matrices = [&in_proj, &project, &out_proj].map(|p| [p.out_features, p.features]);
        let buffers = [out_proj.out, in_proj.out, project.out, update.out];
        let kernels::Update { d_inner, d_state, dt_rank, .. } = update;
        let shape = Shape { rows, matrices, d_inner, d_state, dt_rank, buffers, types: [of_t, of_state] };
        let layer = kernels::Layer { in_proj, project, out_proj, update };
        Some(Self { layer, shape, slots, launches: len + 1 })
    }
}

/// The type that a kernel's name says.
fn type_code(suffix: &str) -> i64 {
    match suffix {
        "f32" => TYPE_F32,
        "f16" => TYPE_F16,
        _ => TYPE_BF16,
    }
}

/// Whether rows are some columns of others that are so wide, from an address on.
fn are_columns(rows: &params::Rows, data: u64, width: i64) -> bool {
    (rows.data, rows.row, rows.column) == (data, width, 1)
}

fn are_same(slots: &params::Slots, others: &params::Slots) -> bool {
    bytemuck::bytes_of(slots) == bytemuck::bytes_of(others)
}

/// How a run is launched.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Plan {
    blocks: usize,
    shared: usize,
    /// The batches that there is room for.
    batches: usize,
    /// Where in shared memory things lie, in the order of the kernel's parameters.
    places: [usize; 7],
    row_bytes: usize,
    /// The most tiles of a product that a block has.
    most_tiles: usize,
}

/// There are so many batches at most, one for each lane.
const MOST_BATCHES: usize = 32;

impl Plan {
    /// None where shared memory has no room.
    fn new(shape: &Shape, device: Properties) -> Option<Self> {
        let &Shape { rows, matrices, dt_rank, d_state, .. } = shape;
        let rows = rows as usize;
        let tiles = matrices.map(|[columns, _]| columns as usize / OUTPUTS);
        // Each block has a tile of in_proj, so that each begins before the first can end.
        let blocks = device.processors.min(tiles[IN_PROJ]);
        let most_tiles = tiles.iter().map(|tiles| tiles.div_ceil(blocks)).max()?;
        if most_tiles * rows * OUTPUTS > WORKERS {
            return None;
        }
        let share = |matrix: usize| (matrices[matrix][1] as usize / CHUNK).div_ceil(WARPS);
        // The rows that in_proj norms are staged in f32 first. Two rows of a share must not lie in the same banks: their distance is
        // an odd multiple of 64 bytes.
        let bytes = (share(IN_PROJ) * CHUNK * 4).max(share(X_PROJ) * CHUNK * 2).max(share(OUT_PROJ) * CHUNK * 2);
        let row_bytes = bytes.next_multiple_of(128) + 64;
        // A barrier and the number of times that it has been waited for, which is not used here.
        let arrival = 2 * size_of::<u64>();
        let sizes = |batches: usize| {
            [
                WARPS * rows * row_bytes,
                matrices[IN_PROJ][1] as usize * size_of::<f32>(),
                // Squares, and slots.
                MOST_ROWS * WARPS * size_of::<f32>() + MOST_ROWS * size_of::<i64>(),
                2 * most_tiles * WARPS * rows * PARTIAL_STRIDE * size_of::<f32>(),
                rows * (dt_rank + 2 * d_state) as usize * size_of::<f32>(),
                2 * size_of::<kernels::Layer>(),
                2 * batches * arrival,
            ]
        };
        let chunks = matrices.map(|[_, features]| features as usize / CHUNK);
        let of_matrix = |matrix: usize| least_batches(chunks[matrix], tiles[matrix].div_ceil(blocks));
        let least_batches = (0..MATRICES).map(of_matrix).max()?;
        (least_batches..=MOST_BATCHES).rev().find_map(|batches| {
            let mut at = batches * BATCH * CHUNK_BYTES;
            let places = sizes(batches).map(|size| {
                let place = at;
                at += size.next_multiple_of(16);
                place
            });
            let plan = Self { blocks, shared: at, batches, places, row_bytes, most_tiles };
            (at <= device.shared_memory).then_some(plan)
        })
    }
}

/// How many batches there must be room for, so that no warp takes one for another: of a barrier it can tell a phase from the next one
/// only, and it skips batches that others use. When it waits for a batch, the one before in the same place must have arrived. All of
/// earlier products have, as all warps have met since; and all that were asked for PACE before the last one that the warp has used.
fn least_batches(chunks: usize, tiles: usize) -> usize {
    let (share, of_tile) = (chunks.div_ceil(WARPS), chunks.div_ceil(BATCH));
    let of_warp = |warp: usize| {
        let (first, end) = (warp * share, ((warp + 1) * share).min(chunks));
        if first >= end {
            return 0;
        }
        let (first, last) = (first / BATCH, (end - 1) / BATCH);
        let in_next_tile = if tiles > 1 { of_tile - last + first + PACE } else { 0 };
        in_next_tile.max(first + 1)
    };
    (0..WARPS).map(of_warp).max().unwrap_or(0).max(PACE + 1)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use cudarc::driver::{CudaSlice, CudaStream};
    use half::{bf16, f16};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    use super::*;
    use crate::cuda::{record, stream_or_skip as stream};
    use crate::decode::cuda::{linear, selective_update};
    use crate::decode::{
        ColumnNorms, Columns, ConvStep, Linear, LinearMut, RowNorm, SelectiveUpdate, SelectiveUpdateMut,
    };
    use crate::{DeviceSlots, Element, Error, Slots, View, ViewMut};

    #[derive(Debug, Clone, Copy)]
    struct Sizes {
        rows: usize,
        d_model: usize,
        d_inner: usize,
        d_state: usize,
        dt_rank: usize,
        layers: usize,
        has_norms: bool,
    }

    const SLOTS: usize = 10;
    const WIDTH: usize = 4;

    struct Layer<T, St> {
        norm: CudaSlice<f32>,
        in_proj: CudaSlice<T>,
        conv: CudaSlice<f32>,
        conv_bias: CudaSlice<f32>,
        x_proj: CudaSlice<T>,
        dt_proj: CudaSlice<T>,
        norms: [CudaSlice<f32>; 3],
        a: CudaSlice<f32>,
        d: CudaSlice<f32>,
        delta_bias: CudaSlice<f32>,
        out_proj: CudaSlice<T>,
        conv_state: CudaSlice<St>,
        state: CudaSlice<St>,
    }

    /// All that a step of some rows reads and writes.
    struct Model<T, St> {
        sizes: Sizes,
        layers: Vec<Layer<T, St>>,
        slots: CudaSlice<i32>,
        /// What a launch before all layers writes.
        sink: CudaSlice<f32>,
        rows: CudaSlice<f32>,
        projected: CudaSlice<T>,
        columns: CudaSlice<T>,
        y: CudaSlice<T>,
    }

    impl<T: Element, St: Element> Model<T, St> {
        fn draw(stream: &Arc<CudaStream>, sizes: Sizes, seed: u64) -> Self {
            let rng = &mut StdRng::seed_from_u64(seed);
            fn uniform<E: Element>(
                stream: &Arc<CudaStream>,
                rng: &mut StdRng,
                len: usize,
                from: f32,
                to: f32,
            ) -> CudaSlice<E> {
                let values: Vec<_> = (0..len).map(|_| E::from_f32(rng.random_range(from..to))).collect();
                stream.clone_htod(&values).unwrap()
            }
            let Sizes { rows, d_model, d_inner, d_state, dt_rank, layers, .. } = sizes;
            let columns = dt_rank + 2 * d_state;
            let layers = (0..layers).map(|_| {
                let weight = |features: usize| (3.0 / features as f32).sqrt();
                Layer {
                    norm: uniform(stream, rng, d_model, 0.5, 1.5),
                    in_proj: uniform(stream, rng, 2 * d_inner * d_model, -weight(d_model), weight(d_model)),
                    conv: uniform(stream, rng, d_inner * WIDTH, -0.5, 0.5),
                    conv_bias: uniform(stream, rng, d_inner, -0.5, 0.5),
                    x_proj: uniform(stream, rng, columns * d_inner, -weight(d_inner), weight(d_inner)),
                    dt_proj: uniform(stream, rng, d_inner * dt_rank, -weight(dt_rank), weight(dt_rank)),
                    norms: [dt_rank, d_state, d_state].map(|len| uniform(stream, rng, len, 0.5, 1.5)),
                    a: uniform(stream, rng, d_inner * d_state, -2.0, -0.1),
                    d: uniform(stream, rng, d_inner, -1.0, 1.0),
                    delta_bias: uniform(stream, rng, d_inner, -2.0, 0.0),
                    out_proj: uniform(stream, rng, d_model * d_inner, -weight(d_inner), weight(d_inner)),
                    conv_state: uniform(stream, rng, SLOTS * (WIDTH - 1) * d_inner, -1.0, 1.0),
                    state: uniform(stream, rng, SLOTS * d_inner * d_state, -1.0, 1.0),
                }
            });
            let layers = layers.collect();
            let mut slots: Vec<i32> = (0..SLOTS as i32).rev().take(rows).collect();
            if rows > 2 {
                slots[1] = -1;
            }
            Self {
                sizes,
                layers,
                slots: stream.clone_htod(&slots).unwrap(),
                sink: stream.alloc_zeros(1).unwrap(),
                rows: uniform(stream, rng, rows * d_model, -2.0, 2.0),
                projected: uniform(stream, rng, rows * 2 * d_inner, 7.0, 8.0),
                columns: uniform(stream, rng, rows * columns, 7.0, 8.0),
                y: uniform(stream, rng, rows * d_inner, 7.0, 8.0),
            }
        }

        /// The operators one by one; before them one that knows nothing of layers, as a lookup of embeddings is.
        fn run(&mut self, stream: &Arc<CudaStream>) -> Result<()> {
            let Sizes { rows, d_model, d_inner, d_state, dt_rank, has_norms, .. } = self.sizes;
            let columns = dt_rank + 2 * d_state;
            let slots = Slots::Device(DeviceSlots::new(&self.slots));
            for (i, layer) in self.layers.iter_mut().enumerate() {
                if i == 0 {
                    let input = Linear::new(View::on_device(&layer.d, [1, 1]), View::on_device(&layer.a, [1, 1]));
                    linear(stream, &input, LinearMut::<_, f32, _>::new(&mut self.sink))?;
                }
                let x = View::on_device(&self.rows, [rows, d_model]);
                let norm = Some(RowNorm { weight: Some(View::on_device(&layer.norm, [d_model])), eps: 1e-5 });
                let bias = Some(View::on_device(&layer.conv_bias, [d_inner]));
                let conv = Some(ConvStep { weight: View::on_device(&layer.conv, [d_inner, WIDTH]), bias, slots });
                let in_proj =
                    Linear { norm, conv, ..Linear::new(x, View::on_device(&layer.in_proj, [2 * d_inner, d_model])) };
                let conv_state = Some(ViewMut::on_device(&mut layer.conv_state, [SLOTS, WIDTH - 1, d_inner]));
                linear(stream, &in_proj, LinearMut { out: &mut self.projected, accumulate: false, conv_state })?;
                let half = |offset| View {
                    offset,
                    strides: [2 * d_inner, 1],
                    ..View::on_device(&self.projected, [rows, d_inner])
                };
                let weight = View::on_device(&layer.x_proj, [columns, d_inner]);
                let [dt, b, c] = &layer.norms;
                let weights = [(dt, dt_rank), (b, d_state), (c, d_state)];
                let weights = weights.map(|(weight, len)| View::on_device(weight, [len]));
                let inputs = SelectiveUpdate {
                    norms: has_norms.then_some(ColumnNorms { weights: Some(weights), eps: 1e-6 }),
                    d: Some(View::on_device(&layer.d, [d_inner])),
                    delta_bias: Some(View::on_device(&layer.delta_bias, [d_inner])),
                    z: Some(half(d_inner)),
                    slots,
                    ..SelectiveUpdate::new(
                        half(0),
                        Columns::Projected { weight },
                        View::on_device(&layer.dt_proj, [d_inner, dt_rank]),
                        View::on_device(&layer.a, [d_inner, d_state]),
                    )
                };
                let state = ViewMut::on_device(&mut layer.state, [SLOTS, d_inner, d_state]);
                let outputs = SelectiveUpdateMut { state, out: &mut self.y, columns: Some(&mut self.columns) };
                selective_update(stream, &inputs, outputs)?;
                let y = View::on_device(&self.y, [rows, d_inner]);
                let out_proj = Linear::new(y, View::on_device(&layer.out_proj, [d_model, d_inner]));
                linear(stream, &out_proj, LinearMut { accumulate: true, ..LinearMut::new(&mut self.rows) })?;
            }
            Ok(())
        }

        /// The bits of the rows, of all states, and of what the last layer has passed on.
        fn bits(&self, stream: &Arc<CudaStream>) -> Vec<Vec<u32>> {
            fn of<E: Element>(stream: &Arc<CudaStream>, slice: &CudaSlice<E>) -> Vec<u32> {
                stream.clone_dtoh(slice).unwrap().iter().map(|x| x.to_f32().to_bits()).collect()
            }
            let states = self.layers.iter().flat_map(|layer| [of(stream, &layer.conv_state), of(stream, &layer.state)]);
            let mut all: Vec<_> = states.collect();
            all.push(of(stream, &self.rows));
            all.extend([&self.projected, &self.columns, &self.y].map(|slice| of(stream, slice)));
            all
        }
    }

    /// Joined, however small, on few blocks: a simulated device takes its time where many wait for each other.
    fn join_few(recording: Recording) -> Recording {
        let properties = Context::of(recording.context()).unwrap().properties;
        join(recording, Properties { processors: 8, ..properties }, 0).unwrap()
    }

    /// Two steps joined have the bits of two steps launch by launch.
    fn hold<T: Element, St: Element>(sizes: Sizes, seed: u64) {
        let Some(stream) = stream() else { return };
        let what = format!("{sizes:?}, {:?}, {:?}, SEED={seed}", T::DTYPE, St::DTYPE);
        let recorded = |is_joined: bool| {
            let mut model = Model::<T, St>::draw(&stream, sizes, seed);
            let recording = record::<Error>(stream.context(), || model.run(&stream)).unwrap();
            let recording = if is_joined { join_few(recording) } else { recording };
            // The first launch is no layer's.
            assert_eq!(recording.len() == 2, is_joined, "{what}");
            let graph = recording.graph().unwrap();
            // SAFETY: all arguments are the model's, which lives on, and only this stream uses them.
            unsafe {
                recording.launch(&stream).unwrap();
                graph.launch(&stream).unwrap();
            }
            model.bits(&stream)
        };
        assert!(recorded(true) == recorded(false), "{what}");
    }

    const SIZES: Sizes =
        Sizes { rows: 1, d_model: 256, d_inner: 256, d_state: 16, dt_rank: 16, layers: 2, has_norms: false };

    #[test]
    fn joined_layers_have_the_bits_of_their_launches() {
        let seed = rand::random();
        hold::<bf16, f32>(SIZES, seed);
        hold::<f16, bf16>(Sizes { rows: 2, layers: 3, ..SIZES }, seed);
        // Warps without a share of the features; shares that are not whole batches, and more channels than there are places for at a time.
        hold::<bf16, f32>(Sizes { d_model: 64, ..SIZES }, seed);
        hold::<bf16, f16>(Sizes { d_model: 480, d_inner: 512, d_state: 64, dt_rank: 32, ..SIZES }, seed);
        hold::<bf16, bf16>(Sizes { rows: 4, d_inner: 256, layers: 1, ..SIZES }, seed);
    }

    /// Layers of two shapes in one recording, of which a second graph is made: each has its own place for what blocks leave to each other.
    #[test]
    fn several_runs_of_layers() {
        let Some(stream) = stream() else { return };
        let seed = rand::random();
        let other = Sizes { rows: 2, d_model: 512, layers: 1, ..SIZES };
        let recorded = |is_joined: bool| {
            let [mut first, mut second] = [SIZES, other].map(|sizes| Model::<bf16, f32>::draw(&stream, sizes, seed));
            let work = || first.run(&stream).and_then(|()| second.run(&stream));
            let recording = record::<Error>(stream.context(), work).unwrap();
            let recording = if is_joined { join_few(recording) } else { recording };
            assert_eq!(recording.len() == 4, is_joined);
            let graphs = [recording.graph().unwrap(), recording.graph().unwrap()];
            drop(recording);
            for graph in graphs {
                // SAFETY: all arguments are the models', which live on, and only this stream uses them.
                unsafe { graph.launch(&stream) }.unwrap();
            }
            [first.bits(&stream), second.bits(&stream)]
        };
        assert!(recorded(true) == recorded(false), "SEED={seed}");
    }

    #[test]
    fn other_launches_stay_as_they_are() {
        let Some(stream) = stream() else { return };
        fn launches<T: Element>(stream: &Arc<CudaStream>, sizes: Sizes, least_bytes: i64) -> (usize, usize) {
            let mut model = Model::<T, f32>::draw(stream, sizes, 0);
            let recording = record::<Error>(stream.context(), || model.run(stream)).unwrap();
            let properties = Context::of(recording.context()).unwrap().properties;
            (recording.len(), join(recording, properties, least_bytes).unwrap().len())
        }
        let of_layers = |sizes| launches::<bf16>(&stream, sizes, 0);
        assert_eq!(of_layers(SIZES).1, 2);
        let others = [
            Sizes { rows: 3, ..SIZES },
            Sizes { has_norms: true, ..SIZES },
            Sizes { dt_rank: 8, ..SIZES },
            Sizes { d_model: 272, ..SIZES },
        ];
        for sizes in others {
            let (before, after) = of_layers(sizes);
            assert_eq!(before, after, "{sizes:?}");
        }
        let (before, after) = launches::<f32>(&stream, SIZES, 0);
        assert_eq!(before, after, "f32");
        let (before, after) = launches::<bf16>(&stream, SIZES, LEAST_BYTES);
        assert_eq!(before, after, "few bytes");
    }

    /// Blocks and memory for mamba-1.4b and 2.8b on an H100; that of a device with 99 KB is too little.
    #[test]
    fn plans() {
        let plan = |matrices: [[i64; 2]; 3], rows, shared_memory| {
            let [[_, d_model], [_, d_inner], _] = matrices;
            let (dt_rank, types) = (d_model / 16, ["bf16", "f32"]);
            let shape = Shape { rows, matrices, d_inner, d_state: 16, dt_rank, buffers: [0; 4], types };
            let plan = Plan::new(&shape, Properties { processors: 132, shared_memory });
            plan.map(|plan| (plan.blocks, plan.batches, plan.most_tiles))
        };
        let (smaller, larger) =
            ([[8192, 2048], [160, 4096], [2048, 4096]], [[10_240, 2560], [192, 5120], [2560, 5120]]);
        assert_eq!(plan(smaller, 1, 232_448), Some((132, 12, 4)));
        assert_eq!(plan(smaller, 2, 232_448), Some((132, 11, 4)));
        assert_eq!(plan(larger, 1, 232_448), Some((132, 12, 5)));
        assert_eq!(plan(smaller, 4, 232_448), Some((132, 9, 4)));
        // More elements than there are workers.
        assert_eq!(plan(larger, 4, 232_448), None);
        assert_eq!(plan(smaller, 1, 101_376), None);
        // The last warp begins in the eighth batch of a tile; in another tile its next one comes eight later.
        assert_eq!([least_batches(128, 1), least_batches(128, 2)], [8, 8 + PACE]);
        assert_eq!([least_batches(160, 1), least_batches(160, 2)], [9, 9 + PACE]);
        assert_eq!(least_batches(1, 3), 1 + PACE);
    }
}
