//! Which kernels a call takes and how its work is divided among them, as a value: it follows from shape, device and plan
//! alone, and is made before anything is launched.

use std::fmt;
use std::ops::Range;

use super::plan::{Pass, PerLane, Plan};
use crate::cuda::params::PackedSegment;
use crate::cuda::params::scan::{
    STATE_BLOCK, backward, backward_chunk_state, backward_general, backward_narrow, forward,
    forward_few_channels as few, forward_general,
};
use crate::cuda::{GRID_ROWS, Kernel, Module, Properties, blocks, packed_segments, suffix};
use crate::sequences::Sequences;
use crate::{DType, MAX_D_STATE};

/// What of a call decides on its kernels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape<'a> {
    pub dtype: DType,
    pub sequences: Sequences<'a>,
    /// The steps of a batch row.
    pub len: usize,
    pub d_inner: usize,
    pub d_state: usize,
    pub groups: usize,
    /// Whether the fast kernels take the inputs and outputs, which they do as Mamba has them.
    pub is_fast: bool,
}

impl Shape<'_> {
    fn element(&self) -> usize {
        match self.dtype {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// Blocks of `channels` channels that cover a group.
    fn group_blocks(&self, channels: usize) -> usize {
        blocks(self.d_inner / self.groups, channels)
    }
}

/// How sequences are divided into segments.
#[derive(Debug, Clone)]
pub(super) enum Division {
    /// Each batch row into `per_row` segments of at most `steps` steps.
    Dense { per_row: usize, steps: usize },
    /// These, as the kernels read them.
    Packed(Vec<PackedSegment>),
}

/// What a launch does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Finds the state that each segment reaches from zero (backward, its gradient), and its ΣΔ.
    ChunkState,
    /// Runs the segments.
    Scan,
}

/// One launch.
#[derive(Debug, Clone)]
pub(super) struct Launch {
    pub kernel: Kernel,
    pub role: Role,
    /// The segments that it takes.
    pub segments: Range<usize>,
    /// Whether these are of sequences that are split, so that they begin with what the chunk states lead to.
    pub is_split: bool,
    /// The first of the states that it takes, of which backward takes 16 at a time.
    pub first_state: usize,
    /// Blocks that a group's channels are cut into.
    pub group_blocks: usize,
    pub grid: [usize; 2],
    pub threads: usize,
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
}

/// A call's launches, in order.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    pub division: Division,
    /// The number of segments.
    pub segments: usize,
    /// Whether any sequence has more than one.
    pub is_split: bool,
    pub launches: Vec<Launch>,
}

/// How a kernel is launched, whatever it takes.
struct Blocks {
    module: Module,
    variant: &'static str,
    channels: usize,
    threads: usize,
    shared: usize,
    most_shared: usize,
}

/// Steps that a block of the forward pass works on at least, if there are enough sequences: it takes several short ones one
/// after the other, to share the cost of reading the parameters.
const STEPS_PER_BLOCK: usize = 64;

/// Blocks for each processor that the rows of a backward pass are enough for; more would only make more parts of sums.
const BLOCKS_PER_PROCESSOR: usize = 8;

impl Recipe {
    pub fn forward(shape: &Shape, device: Properties, plan: &Plan) -> Self {
        let &Shape { d_inner, d_state, .. } = shape;
        let has_many_states = d_state > STATE_BLOCK;
        let part_of = |rows, len| match shape.is_fast && !has_many_states {
            true => plan
                .part_of_channel(rows, len, d_inner, device.processors)
                .filter(|part| part.shared_memory(shape.element()) <= device.shared_memory),
            false => None,
        };
        let (mut recipe, parts) = Self::divide(shape, device, plan, Pass::Forward, part_of);
        let segments = recipe.segments;
        let states =
            |threads: usize, d_state: usize| d_state.div_ceil(STATE_BLOCK) * threads * forward::STATE_BLOCK_SMEM;
        let fast = |per_lane: PerLane| {
            let shared = per_lane.shared_memory(shape.element());
            let (module, variant, channels, threads) = match per_lane {
                PerLane::Quarter => {
                    (Module::SCAN_FORWARD_FEW_CHANNELS, "few_channels_one_state", few::ONE_CHANNELS, few::THREADS)
                }
                PerLane::Half => {
                    (Module::SCAN_FORWARD_FEW_CHANNELS, "few_channels_two_states", few::TWO_CHANNELS, few::THREADS)
                }
                PerLane::One => (Module::SCAN_FORWARD, "one", forward::ONE_CHANNELS, forward::THREADS),
                PerLane::Four => (Module::SCAN_FORWARD, "four", forward::FOUR_CHANNELS, forward::THREADS),
            };
            Blocks { module, variant, channels, threads, shared, most_shared: shared }
        };
        let parked = |module, variant, channels, threads| Blocks {
            module,
            variant,
            channels,
            threads,
            shared: states(threads, d_state),
            most_shared: states(threads, MAX_D_STATE),
        };
        let main = match (shape.is_fast, has_many_states) {
            (false, _) => {
                let (channels, threads) = (forward_general::CHANNELS, forward_general::THREADS);
                parked(Module::SCAN_FORWARD_GENERAL, "general", channels, threads)
            }
            (true, true) => parked(Module::SCAN_FORWARD, "many_states", forward::ONE_CHANNELS, forward::THREADS),
            (true, false) if recipe.is_split => fast(PerLane::One),
            (true, false) => {
                let steps = match shape.sequences {
                    Sequences::Dense { batch, len } => batch * len,
                    Sequences::Packed(_) => shape.len,
                };
                fast(plan.per_lane(steps / segments.max(1), segments, d_inner, device.processors))
            }
        };

        let per_block = (STEPS_PER_BLOCK / shape.len.max(1)).max(1);
        let rows = |segments: &Range<usize>| segments.len().div_ceil(per_block).min(GRID_ROWS);
        let in_parts = parts.map_or(0, |(_, count)| count);
        if let Some((part, count)) = parts.filter(|(_, count)| *count > 0) {
            recipe.add(shape, Role::Scan, "scan_forward", &fast(part), 0..count, rows(&(0..count)), 0);
        }
        let others = in_parts..segments;
        if !others.is_empty() {
            if recipe.is_split {
                let chunk_state = Blocks { module: Module::SCAN_CHUNK_STATE, ..main };
                let rows = rows(&others);
                recipe.add(shape, Role::ChunkState, "scan_chunk_state", &chunk_state, others.clone(), rows, 0);
            }
            recipe.add(shape, Role::Scan, "scan_forward", &main, others.clone(), rows(&others), 0);
        }
        recipe
    }

    pub fn backward(shape: &Shape, device: Properties, plan: &Plan) -> Self {
        let (mut recipe, _) = Self::divide(shape, device, plan, Pass::Backward, |_, _| None);
        let segments = recipe.segments;
        // Some devices, 8.6, 8.9 and 12.0 among them, give a block less than the fast kernel's shared memory.
        let shared = backward::SMEM + backward::SMEM_PER_BYTE * shape.element();
        let is_fast = shape.is_fast && shared <= device.shared_memory;
        let columns = shape.groups * shape.group_blocks(backward::CHANNELS);
        let is_narrow = is_fast && !recipe.is_split && shape.d_state <= STATE_BLOCK && {
            let blocks = columns * segments;
            // Packed sequences get what each gets alone, with which blocks of its own would not be so many.
            let is_uneven = matches!(shape.sequences, Sequences::Dense { .. })
                && (device.processors + 1..=device.processors * 3 / 2).contains(&blocks);
            plan.narrow.unwrap_or(is_uneven)
        };
        let narrow_shared = backward_narrow::SMEM + backward_narrow::SMEM_PER_BYTE * shape.element();
        let scan = match is_fast {
            true if is_narrow => Blocks {
                module: Module::SCAN_BACKWARD_NARROW,
                variant: "narrow",
                channels: backward_narrow::CHANNELS,
                threads: backward_narrow::THREADS,
                shared: narrow_shared,
                most_shared: narrow_shared,
            },
            true => Blocks {
                module: Module::SCAN_BACKWARD,
                variant: if shape.d_state > STATE_BLOCK { "many_states" } else { "fast" },
                channels: backward::CHANNELS,
                threads: backward::THREADS,
                shared,
                most_shared: shared,
            },
            false => Blocks {
                module: Module::SCAN_BACKWARD_GENERAL,
                variant: "general",
                channels: backward_general::CHANNELS,
                threads: backward_general::THREADS,
                shared: backward_general::SMEM,
                most_shared: backward_general::SMEM,
            },
        };
        let chunk_state = Blocks {
            module: Module::SCAN_BACKWARD_CHUNK_STATE,
            variant: if is_fast { "fast" } else { "general" },
            channels: backward_chunk_state::CHANNELS,
            threads: backward_chunk_state::THREADS,
            shared: 0,
            most_shared: 0,
        };
        // Each row of blocks sums the gradients of parameters over the segments that it takes: as many rows for both kernels,
        // so that they give the same bits.
        let rows = segments.min((BLOCKS_PER_PROCESSOR * device.processors).div_ceil(columns)).min(GRID_ROWS);
        let states = if segments > 0 { shape.d_state } else { 0 };
        for first in (0..states).step_by(STATE_BLOCK) {
            if recipe.is_split {
                let name = "scan_backward_chunk_state";
                recipe.add(shape, Role::ChunkState, name, &chunk_state, 0..segments, rows, first);
            }
            recipe.add(shape, Role::Scan, "scan_backward", &scan, 0..segments, rows, first);
        }
        recipe
    }

    /// The launches of this role.
    pub fn of_role(&self, role: Role) -> impl Iterator<Item = &Launch> {
        self.launches.iter().filter(move |launch| launch.role == role)
    }

    /// Divides sequences, and gives what a lane carries of those that come first, with their number, where `part_of` says
    /// that it is a part of a channel.
    fn divide(
        shape: &Shape,
        device: Properties,
        plan: &Plan,
        pass: Pass,
        part_of: impl Fn(usize, usize) -> Option<PerLane>,
    ) -> (Self, Option<(PerLane, usize)>) {
        let divided = |plan: &Plan, rows, len| plan.steps(pass, rows, len, shape.d_inner, device.processors);
        let (division, segments, is_split, parts) = match shape.sequences {
            Sequences::Dense { batch, len } => {
                let part = part_of(batch, len);
                let plan = if part.is_some() { &Plan { segment_steps: Some(usize::MAX), ..*plan } } else { plan };
                let steps = divided(plan, batch, len);
                // An empty sequence has one empty segment, which hands its state on.
                let per_row = len.div_ceil(steps).max(1);
                let count = batch * per_row;
                (Division::Dense { per_row, steps }, count, per_row > 1, part.map(|part| (part, count)))
            }
            Sequences::Packed(_) => {
                // Each as if it were alone. Those of which lanes carry parts come first: they are launched by themselves.
                let (in_parts, others): (Vec<_>, Vec<_>) =
                    shape.sequences.iter().partition(|sequence| part_of(1, sequence.len).is_some());
                // They all carry the same part, as it depends on the channels.
                let part = in_parts.first().and_then(|sequence| part_of(1, sequence.len));
                let whole = in_parts.iter().map(|sequence| (sequence, usize::MAX));
                let others = others.iter().map(|sequence| (sequence, divided(plan, 1, sequence.len)));
                let (mut entries, mut is_split) = (Vec::new(), false);
                for (sequence, steps) in whole.chain(others) {
                    is_split |= sequence.len > steps;
                    entries.extend(packed_segments(sequence, steps));
                }
                let count = entries.len();
                (Division::Packed(entries), count, is_split, part.map(|part| (part, in_parts.len())))
            }
        };
        (Self { division, segments, is_split, launches: Vec::new() }, parts)
    }

    #[expect(clippy::too_many_arguments, reason = "each is one of the launch's numbers")]
    fn add(
        &mut self,
        shape: &Shape,
        role: Role,
        name: &'static str,
        blocks: &Blocks,
        segments: Range<usize>,
        rows: usize,
        first_state: usize,
    ) {
        let group_blocks = shape.group_blocks(blocks.channels);
        // Lanes carry parts of channels where sequences are not split.
        let is_split = self.is_split && blocks.module != Module::SCAN_FORWARD_FEW_CHANNELS;
        self.launches.push(Launch {
            kernel: Kernel {
                most_shared: blocks.most_shared,
                ..Kernel::new(blocks.module, [name, blocks.variant, suffix(shape.dtype)])
            },
            role,
            segments,
            is_split,
            first_state,
            group_blocks,
            grid: [shape.groups * group_blocks, rows],
            threads: blocks.threads,
            shared: blocks.shared,
        });
    }
}

/// A line for the segments, and one for each launch.
impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match &self.division {
            Division::Dense { per_row: 1, .. } => write!(f, "{} whole sequences", self.segments)?,
            Division::Dense { per_row, steps } => {
                write!(f, "{} segments, {per_row} of {steps} steps to a sequence", self.segments)?;
            }
            Division::Packed(_) => write!(f, "{} segments of packed sequences", self.segments)?,
        }
        for Launch { kernel, segments, first_state, grid: [columns, rows], threads, shared, .. } in &self.launches {
            write!(f, "\n{kernel}: segments {segments:?}")?;
            if *first_state > 0 {
                write!(f, ", states from {first_state} on")?;
            }
            write!(f, "; {columns} x {rows} blocks of {threads} threads, {shared} bytes of dynamic shared memory")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn device(processors: usize, kilobytes: usize) -> Properties {
        Properties { processors, shared_memory: 1024 * kilobytes }
    }

    /// One of each kind, by compute capability: A100, A40, RTX 4090, H100, RTX 5090.
    const DEVICES: [(&str, Properties); 5] = [
        ("8.0", device(108, 163)),
        ("8.6", device(84, 99)),
        ("8.9", device(128, 99)),
        ("9.0", device(132, 227)),
        ("12.0", device(170, 99)),
    ];

    fn shape(batch: usize, len: usize, d_inner: usize, d_state: usize) -> Shape<'static> {
        let sequences = Sequences::Dense { batch, len };
        Shape { dtype: DType::Bf16, sequences, len, d_inner, d_state, groups: 1, is_fast: true }
    }

    /// The number of segments of each sequence, and the kernels without `scan` and type.
    fn summary(recipe: &Recipe) -> String {
        let per_row = match recipe.division {
            Division::Dense { per_row, .. } => per_row,
            Division::Packed(_) => recipe.segments,
        };
        let name = |launch: &Launch| launch.kernel.name[..2].join("_").replacen("scan_", "", 1);
        let kernels: Vec<_> = recipe.launches.iter().map(name).collect();
        format!("{per_row} {}", kernels.join(" "))
    }

    /// What a change of the plan changes here is to be measured on a GPU, and noted in benches/tuning.md.
    #[test]
    fn of_devices_that_are_not_here() {
        let cases: [(&[&str], [usize; 4], &str, &str); 20] = [
            // Few channels: carried in parts where a block may have the shared memory and that fills the device, else split.
            (
                &["8.0"],
                [1, 2048, 1024, 16],
                "16 chunk_state_one forward_one",
                "11 backward_chunk_state_fast backward_fast",
            ),
            (
                &["8.6"],
                [1, 2048, 1024, 16],
                "11 chunk_state_one forward_one",
                "8 backward_chunk_state_general backward_general",
            ),
            (
                &["8.9"],
                [1, 2048, 1024, 16],
                "1 forward_few_channels_one_state",
                "16 backward_chunk_state_general backward_general",
            ),
            (
                &["9.0"],
                [1, 2048, 1024, 16],
                "1 forward_few_channels_one_state",
                "16 backward_chunk_state_fast backward_fast",
            ),
            (
                &["12.0"],
                [1, 2048, 1024, 16],
                "16 chunk_state_one forward_one",
                "16 backward_chunk_state_general backward_general",
            ),
            // Enough of them.
            (&["8.0", "9.0"], [8, 2048, 2048, 16], "1 forward_one", "1 backward_fast"),
            (&["8.6", "8.9"], [8, 2048, 2048, 16], "1 forward_one", "1 backward_general"),
            (&["12.0"], [8, 2048, 2048, 16], "1 forward_one", "1 backward_general"),
            // Between one and one and a half blocks of four warps for each of 132 processors.
            (&["9.0"], [8, 2048, 1536, 16], "1 forward_one", "1 backward_narrow"),
            (&["9.0"], [8, 2048, 1536, 32], "1 forward_many_states", "1 backward_many_states backward_many_states"),
            (&["8.0", "9.0"], [64, 512, 1536, 16], "1 forward_one", "1 backward_fast"),
            // Short sequences.
            (&["8.0", "9.0"], [2048, 16, 1536, 16], "1 forward_four", "1 backward_fast"),
            (&["8.6", "8.9", "12.0"], [2048, 16, 1536, 16], "1 forward_four", "1 backward_general"),
            // Long ones.
            (
                &["8.0"],
                [1, 65_536, 2048, 16],
                "32 chunk_state_one forward_one",
                "27 backward_chunk_state_fast backward_fast",
            ),
            (
                &["8.9"],
                [1, 65_536, 2048, 16],
                "40 chunk_state_one forward_one",
                "32 backward_chunk_state_general backward_general",
            ),
            (
                &["9.0"],
                [1, 65_536, 2048, 16],
                "1 forward_few_channels_two_states",
                "32 backward_chunk_state_fast backward_fast",
            ),
            (
                &["9.0"],
                [1, 524_288, 1024, 16],
                "82 chunk_state_one forward_one",
                "66 backward_chunk_state_fast backward_fast",
            ),
            // More states than 16.
            (
                &["9.0"],
                [8, 2048, 2048, 48],
                "1 forward_many_states",
                "1 backward_many_states backward_many_states backward_many_states",
            ),
            (&["8.6"], [8, 2048, 2048, 32], "1 forward_many_states", "1 backward_general backward_general"),
            // Nothing to do.
            (&["9.0"], [2, 0, 2048, 16], "1 forward_one", "1 backward_fast"),
        ];
        for (names, [batch, len, d_inner, d_state], forward, backward) in cases {
            for (name, device) in DEVICES.into_iter().filter(|(name, _)| names.contains(name)) {
                let shape = shape(batch, len, d_inner, d_state);
                let what = format!("{name}: {batch} x {len}, {d_inner} channels of {d_state} states");
                assert_eq!(summary(&Recipe::forward(&shape, device, &Plan::default())), forward, "{what}");
                assert_eq!(summary(&Recipe::backward(&shape, device, &Plan::default())), backward, "{what}");
            }
        }
        assert!(Recipe::forward(&shape(0, 2048, 2048, 16), DEVICES[3].1, &Plan::default()).launches.is_empty());
        assert!(Recipe::backward(&shape(0, 2048, 2048, 16), DEVICES[3].1, &Plan::default()).launches.is_empty());
        // In f32 a part of a channel takes more shared memory than a block has there.
        let wide = Shape { dtype: DType::F32, ..shape(1, 2048, 1024, 16) };
        assert_eq!(summary(&Recipe::forward(&wide, DEVICES[2].1, &Plan::default())), "16 chunk_state_one forward_one");
        // What the fast kernels do not take.
        let general = Shape { is_fast: false, ..shape(8, 2048, 2048, 16) };
        assert_eq!(summary(&Recipe::forward(&general, DEVICES[3].1, &Plan::default())), "1 forward_general");
        assert_eq!(summary(&Recipe::backward(&general, DEVICES[3].1, &Plan::default())), "1 backward_general");
    }

    /// Every segment, and every channel of every group, is some launch's, and of segments that are split a chunk state is known.
    #[test]
    fn launches_cover_everything() {
        let offsets = [0, 5, 5, 3000, 3100, 90_000, 90_064];
        for (_, device) in DEVICES {
            for (sequences, len) in
                [(Sequences::Packed(&offsets), 90_064), (Sequences::Dense { batch: 3, len: 5000 }, 5000)]
            {
                for (d_inner, groups, is_fast) in [(64, 1, true), (1536, 2, true), (70, 7, false), (5120, 1, true)] {
                    let shape = Shape { sequences, len, d_inner, groups, is_fast, ..shape(1, len, d_inner, 40) };
                    for d_state in [16, 40] {
                        let shape = Shape { d_state, ..shape };
                        for recipe in [
                            Recipe::forward(&shape, device, &Plan::default()),
                            Recipe::backward(&shape, device, &Plan::default()),
                        ] {
                            let mut times = vec![0; recipe.segments];
                            for launch in recipe.of_role(Role::Scan).filter(|launch| launch.first_state == 0) {
                                launch.segments.clone().for_each(|i| times[i] += 1);
                                let states = recipe.of_role(Role::ChunkState).any(|of| of.segments == launch.segments);
                                assert_eq!(launch.is_split, states, "{recipe}");
                                assert_eq!(launch.grid[0], groups * launch.group_blocks, "{recipe}");
                            }
                            assert!(times.iter().all(|times| *times == 1), "{recipe}");
                        }
                    }
                }
            }
        }
    }

    /// A packed sequence is divided as it would be alone.
    #[test]
    fn a_packed_sequence_is_divided_as_alone() {
        let offsets = [0, 100, 70_000, 70_500];
        for (_, device) in DEVICES {
            let packed = Shape { sequences: Sequences::Packed(&offsets), ..shape(1, 70_500, 1024, 16) };
            let Division::Packed(entries) = Recipe::forward(&packed, device, &Plan::default()).division else {
                panic!("the sequences are packed");
            };
            for (sequence, lens) in offsets.windows(2).enumerate() {
                let len = lens[1] - lens[0];
                let alone = Recipe::forward(&shape(1, len, 1024, 16), device, &Plan::default());
                let segments = entries.iter().filter(|segment| segment.sequence == sequence as i64);
                assert_eq!(segments.clone().count(), alone.segments);
                assert_eq!(segments.map(|segment| segment.steps as usize).sum::<usize>(), len);
            }
        }
    }

    #[test]
    fn printed() {
        let recipe = Recipe::forward(&shape(1, 524_288, 1024, 16), DEVICES[3].1, &Plan::default());
        let text = "82 segments, 82 of 6400 steps to a sequence\n\
            scan_chunk_state_one_bf16: segments 0..82; 32 x 82 blocks of 128 threads, 0 bytes of dynamic shared memory\n\
            scan_forward_one_bf16: segments 0..82; 32 x 82 blocks of 128 threads, 0 bytes of dynamic shared memory";
        assert_eq!(recipe.to_string(), text);
    }
}
