//! What kernels take: the same structs, field by field, as in `kernels/`. Addresses are in bytes, strides in elements.

use bytemuck::{Pod, Zeroable};

use super::{Arguments, Cuda};
use crate::{Element, Projection, Result, View, ViewMut};

macro_rules! params {
    ($($(#[$doc:meta])* $name:ident[$size:literal] { $($field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Pod, Zeroable)]
        #[repr(C)]
        pub(crate) struct $name {
            $(pub $field: $type,)*
        }
        // The other side asserts the same size; all fields are 8 bytes or whole structs of such, so equal sizes with
        // fields of the same names in the same order are equal layouts.
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

pub(crate) const UPLOAD_VALUES: usize = 496;
pub(crate) const MOST_SUMS: usize = 5;

params! {
    /// `(batch, length, d_inner)`.
    Activation[32] { data: u64, batch: i64, step: i64, channel: i64, }

    /// B or C.
    ProjectionParams[56] {
        data: u64,
        batch: i64,
        step: i64,
        group: i64,
        channel: i64,
        state: i64,
        constant: i64,
    }

    /// `(d_inner, d_state)`.
    Matrix[24] { data: u64, channel: i64, state: i64, }

    /// `(d_inner)`.
    Vector[16] { data: u64, channel: i64, }

    /// `(sequences, d_inner, d_state)`.
    States[32] { data: u64, sequence: i64, channel: i64, state: i64, }

    Segments[40] { packed: u64, count: i64, len: i64, per_row: i64, steps: i64, }

    ScanInputs[392] {
        u: Activation,
        delta: Activation,
        z: Activation,
        a: Matrix,
        b: ProjectionParams,
        c: ProjectionParams,
        d: Vector,
        delta_bias: Vector,
        initial_state: States,
        segments: Segments,
        d_inner: i64,
        d_state: i64,
        group_channels: i64,
        group_blocks: i64,
        reached: u64,
        sums: u64,
        flags: u64,
    }

    ScanForward[416] { inputs: ScanInputs, out: u64, final_state: u64, checkpoints: u64, }

    ScanBackward[576] {
        inputs: ScanInputs,
        d_out: Activation,
        d_final_state: States,
        checkpoints: u64,
        d_u: u64,
        d_delta: u64,
        d_z: u64,
        d_initial_state: u64,
        d_a: u64,
        d_b: u64,
        d_c: u64,
        d_d: u64,
        d_bias: u64,
        projections: u64,
        carried: u64,
        groups: i64,
        steps: i64,
        first_state: i64,
    }

    /// `(slots, rows, columns)`.
    Pool[32] { data: u64, slot: i64, row: i64, column: i64, }

    Slots[2064] { table: u64, kind: i64, few: [i32; 512], }

    StateUpdate[2432] {
        u: Activation,
        dt: Activation,
        z: Activation,
        a: Matrix,
        b: ProjectionParams,
        c: ProjectionParams,
        d: Vector,
        dt_bias: Vector,
        state: Pool,
        out: u64,
        token_states: u64,
        batch: i64,
        tokens: i64,
        d_inner: i64,
        d_state: i64,
        group_channels: i64,
        lane_shift: i64,
        flags: u64,
        slots: Slots,
    }

    Rollback[104] {
        state: Pool,
        token_states: u64,
        batch: i64,
        token: i64,
        row: i64,
        column: i64,
        restored: u64,
        count: i64,
        rows: i64,
        columns: i64,
    }

    /// `(sequences, width - 1, d_inner)`.
    StateRows[32] { data: u64, sequence: i64, row: i64, channel: i64, }

    Runs[48] { packed: u64, sequences: i64, len: i64, per_row: i64, steps: i64, count: i64, }

    ConvInputs[184] {
        x: Activation,
        weight: Matrix,
        bias: Vector,
        initial_state: StateRows,
        runs: Runs,
        d_inner: i64,
        width: i64,
        lane_shift: i64,
        flags: u64,
    }

    ConvForward[200] { inputs: ConvInputs, out: u64, final_state: u64, }

    ConvBackward[272] {
        inputs: ConvInputs,
        d_out: Activation,
        d_final_state: StateRows,
        d_x: u64,
        d_initial_state: u64,
        parts: u64,
    }

    ConvUpdate[2232] {
        x: Activation,
        weight: Matrix,
        bias: Vector,
        state: Pool,
        out: u64,
        token_states: u64,
        batch: i64,
        tokens: i64,
        d_inner: i64,
        width: i64,
        lane_shift: i64,
        flags: u64,
        slots: Slots,
    }

    Sum[72] {
        from: u64,
        to: u64,
        parts: i64,
        m: i64,
        stride: i64,
        row_shift: i64,
        first_block: i64,
        blocks: i64,
        flags: u64,
    }

    Sums[368] { sums: [Sum; MOST_SUMS], count: i64, }

    Upload[3984] { to: u64, count: u64, values: [u64; UPLOAD_VALUES], }
}

macro_rules! with_inputs {
    ($($name:ident),*) => {$(
        impl AsMut<ScanInputs> for $name {
            fn as_mut(&mut self) -> &mut ScanInputs {
                &mut self.inputs
            }
        }
    )*};
}

with_inputs!(ScanForward, ScanBackward);

impl Upload {
    pub fn zeroed_boxed() -> Box<Self> {
        bytemuck::allocation::zeroed_box()
    }
}

impl<'a> Arguments<'a> {
    pub fn activation<T: Element>(
        &mut self,
        argument: &'static str,
        view: &View<'a, T, 3, Cuda>,
    ) -> Result<Activation> {
        let (data, [batch, step, channel]) = self.view(argument, view)?;
        Ok(Activation { data, batch, step, channel })
    }

    pub fn optional_activation<T: Element>(
        &mut self,
        argument: &'static str,
        view: &Option<View<'a, T, 3, Cuda>>,
    ) -> Result<Activation> {
        view.as_ref().map_or(Ok(Activation::zeroed()), |view| self.activation(argument, view))
    }

    pub fn matrix(&mut self, argument: &'static str, view: &View<'a, f32, 2, Cuda>) -> Result<Matrix> {
        let (data, [channel, state]) = self.view(argument, view)?;
        Ok(Matrix { data, channel, state })
    }

    pub fn vector(&mut self, argument: &'static str, view: &Option<View<'a, f32, 1, Cuda>>) -> Result<Vector> {
        let Some(view) = view else { return Ok(Vector::zeroed()) };
        let (data, [channel]) = self.view(argument, view)?;
        Ok(Vector { data, channel })
    }

    pub fn states(&mut self, argument: &'static str, view: &Option<View<'a, f32, 3, Cuda>>) -> Result<States> {
        let Some(view) = view else { return Ok(States::zeroed()) };
        let (data, [sequence, channel, state]) = self.view(argument, view)?;
        Ok(States { data, sequence, channel, state })
    }

    pub fn projection<T: Element>(
        &mut self,
        argument: &'static str,
        projection: &Projection<'a, T, Cuda>,
    ) -> Result<ProjectionParams> {
        match projection {
            Projection::Varying(view) => {
                let (data, [batch, step, group, state]) = self.view(argument, view)?;
                Ok(ProjectionParams { data, batch, step, group, channel: 0, state, constant: 0 })
            }
            Projection::Constant(view) => {
                let (data, [channel, state]) = self.view(argument, view)?;
                Ok(ProjectionParams { data, batch: 0, step: 0, group: 0, channel, state, constant: 1 })
            }
        }
    }

    /// The pool of an update, to be read and written.
    pub fn pool<St: Element>(&mut self, argument: &'static str, view: ViewMut<'a, St, 3, Cuda>) -> Result<Pool> {
        let data = self.write(argument, view.data)?;
        let [slot, row, column] = view.strides.map(|stride| stride as i64);
        // A view of no elements may start anywhere.
        Ok(Pool { data: data.wrapping_add((view.offset * size_of::<St>()) as u64), slot, row, column })
    }

    /// The states of a convolution.
    pub fn state_rows(&mut self, argument: &'static str, view: &Option<View<'a, f32, 3, Cuda>>) -> Result<StateRows> {
        let Some(view) = view else { return Ok(StateRows::zeroed()) };
        let (data, [sequence, row, channel]) = self.view(argument, view)?;
        Ok(StateRows { data, sequence, row, channel })
    }
}
