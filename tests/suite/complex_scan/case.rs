//! Problems of the scan with complex states, drawn.

use selective_scan::complex_scan::{Inputs, Options, OutputGradients, UpdateInputs};
use selective_scan::{Element, Projection, View};

use crate::support::draw::Draw;
use crate::support::strided::Strided;

/// What a problem is like.
#[derive(Debug, Clone)]
pub struct Shape {
    pub batch: usize,
    pub length: usize,
    pub d_inner: usize,
    pub d_state: usize,
    pub groups: usize,
    /// Whether B and C vary.
    pub varying: [bool; 2],
    pub cu_seqlens: Option<Vec<usize>>,
    pub options: Options,
    /// Whether there are a gate, a skip connection, a bias and states.
    pub with: [bool; 4],
    /// The decay rates.
    pub decay: [f32; 2],
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            batch: 2,
            length: 37,
            d_inner: 19,
            d_state: 5,
            groups: 1,
            varying: [true; 2],
            cu_seqlens: None,
            options: Options::default(),
            with: [true; 4],
            decay: [0.1, 2.0],
        }
    }
}

impl Shape {
    /// Any small one.
    pub fn draw(draw: &mut Draw) -> Self {
        let length = draw.one_of(&[1, 2, 17, 64, 65, 150]);
        let packed = draw.flag();
        let cu_seqlens = packed.then(|| {
            let mut cuts: Vec<usize> =
                draw.uniform::<f32>(3, 0.0, 1.0).iter().map(|x| (x * length as f32) as usize).collect();
            cuts.extend([0, length]);
            cuts.sort_unstable();
            cuts
        });
        let (d_inner, groups) = draw.one_of(&[(1, 1), (8, 1), (21, 3), (20, 2), (9, 1)]);
        Self {
            batch: if packed { 1 } else { draw.one_of(&[1, 3, 10]) },
            length,
            d_inner,
            groups,
            d_state: draw.one_of(&[1, 2, 3, 8]),
            varying: [draw.flag(), draw.flag()],
            cu_seqlens,
            options: Options { delta_softplus: draw.flag(), reverse: draw.flag() },
            with: [draw.flag(), draw.flag(), draw.flag(), draw.flag()],
            ..Self::default()
        }
    }

    pub fn sequences(&self) -> usize {
        self.cu_seqlens.as_ref().map_or(self.batch, |cuts| cuts.len() - 1)
    }
}

pub struct Case<T> {
    pub shape: Shape,
    pub u: Strided<T>,
    pub delta: Strided<T>,
    pub z: Strided<T>,
    pub d_out: Strided<T>,
    pub varying: [Vec<T>; 2],
    pub constant: [Vec<f32>; 2],
    pub a: Vec<f32>,
    pub d: Vec<f32>,
    pub bias: Vec<f32>,
    pub state: Vec<f32>,
    pub d_state: Vec<f32>,
}

impl<T: Element> Case<T> {
    pub fn new(shape: Shape, draw: &mut Draw) -> Self {
        let activation = [shape.batch, shape.length, shape.d_inner];
        let [u, z, d_out] = [(); 3].map(|()| draw.activation::<T>(activation));
        let mut delta = draw.activation::<T>(activation);
        let (low, high) = if shape.options.delta_softplus { (-3.0, 1.0) } else { (0.02, 0.5) };
        for x in &mut delta.data {
            *x = T::from_f32((x.to_f32() + 1.0) / 2.0 * (high - low) + low);
        }
        let pairs = shape.d_inner * shape.d_state;
        let rates = draw.uniform::<f32>(pairs, shape.decay[0].ln(), shape.decay[1].ln());
        let turns = draw.uniform::<f32>(pairs, -20.0, 20.0);
        let states = 2 * shape.sequences() * pairs;
        let projection = 2 * shape.batch * shape.length * shape.groups * shape.d_state;
        Self {
            u,
            delta,
            z,
            d_out,
            varying: [(); 2].map(|()| draw.uniform(projection, -1.0, 1.0)),
            constant: [(); 2].map(|()| draw.uniform(2 * pairs, -1.0, 1.0)),
            a: rates.iter().zip(turns).flat_map(|(rate, turn)| [-rate.exp(), turn]).collect(),
            d: draw.uniform(shape.d_inner, -1.0, 1.0),
            bias: draw.uniform(shape.d_inner, 0.0, 0.3),
            state: draw.uniform(states, -1.0, 1.0),
            d_state: draw.uniform(states, -1.0, 1.0),
            shape,
        }
    }

    fn projection(&self, which: usize) -> Projection<'_, T> {
        let Shape { batch, length, d_inner, d_state, groups, .. } = self.shape;
        match self.shape.varying[which] {
            true => View::new(&self.varying[which], [batch, length, groups, 2 * d_state]).into(),
            false => View::new(&self.constant[which], [d_inner, 2 * d_state]).into(),
        }
    }

    pub fn state_shape(&self) -> [usize; 3] {
        [self.shape.sequences(), self.shape.d_inner, 2 * self.shape.d_state]
    }

    pub fn inputs(&self) -> Inputs<'_, T> {
        let [with_gate, with_skip, with_bias, with_state] = self.shape.with;
        let channels = [self.shape.d_inner];
        Inputs {
            z: with_gate.then(|| self.z.view()),
            d: with_skip.then(|| View::new(&self.d, channels)),
            delta_bias: with_bias.then(|| View::new(&self.bias, channels)),
            initial_state: with_state.then(|| View::new(&self.state, self.state_shape())),
            cu_seqlens: self.shape.cu_seqlens.as_deref(),
            options: self.shape.options,
            ..Inputs::new(
                self.u.view(),
                self.delta.view(),
                View::new(&self.a, [self.shape.d_inner, 2 * self.shape.d_state]),
                self.projection(0),
                self.projection(1),
            )
        }
    }

    pub fn update_inputs(&self) -> UpdateInputs<'_, T> {
        let all = self.inputs();
        UpdateInputs {
            z: all.z,
            d: all.d,
            delta_bias: all.delta_bias,
            delta_softplus: all.options.delta_softplus,
            ..UpdateInputs::new(all.u, all.delta, all.a, all.b, all.c)
        }
    }

    pub fn d_outputs(&self) -> OutputGradients<'_, T> {
        let d_final_state = self.shape.with[3].then(|| View::new(&self.d_state, self.state_shape()));
        OutputGradients { d_out: self.d_out.view(), d_final_state }
    }
}
