//! Problems of S4D, drawn.

use selective_scan::lti::Rule;
use selective_scan::lti::s4d::{Inputs, Options, OutputGradients};
use selective_scan::{Element, View};

use crate::support::draw::Draw;
use crate::support::strided::{Layout, Strided};

/// What a problem is like.
#[derive(Debug, Clone)]
pub struct Shape {
    pub batch: usize,
    pub length: usize,
    pub d_inner: usize,
    pub d_state: usize,
    pub cu_seqlens: Option<Vec<usize>>,
    pub options: Options,
    pub with_d: bool,
    pub with_state: bool,
    pub layout: Layout,
    /// The step sizes, as S4D draws them: evenly on a logarithmic scale.
    pub delta: [f32; 2],
    /// The decay rates and the largest frequency.
    pub decay: [f32; 2],
    pub fastest: f32,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            batch: 2,
            length: 37,
            d_inner: 19,
            d_state: 5,
            cu_seqlens: None,
            options: Options::default(),
            with_d: true,
            with_state: true,
            layout: Layout::default(),
            delta: [1e-3, 0.1],
            decay: [0.3, 2.0],
            fastest: 60.0,
        }
    }
}

impl Shape {
    /// Any small one.
    pub fn draw(draw: &mut Draw) -> Self {
        let length = draw.one_of(&[1, 2, 15, 16, 17, 33, 128, 129, 300]);
        let packed = draw.flag();
        let cu_seqlens = packed.then(|| {
            let mut cuts: Vec<usize> =
                draw.uniform::<f32>(3, 0.0, 1.0).iter().map(|x| (x * length as f32) as usize).collect();
            cuts.extend([0, length]);
            cuts.sort_unstable();
            cuts
        });
        let rule = draw.one_of(&[Rule::ZeroOrderHold, Rule::Bilinear]);
        Self {
            batch: if packed { 1 } else { draw.one_of(&[1, 3]) },
            length,
            d_inner: draw.one_of(&[1, 4, 16, 21, 40]),
            d_state: draw.one_of(&[1, 2, 3, 8, 11]),
            cu_seqlens,
            options: Options { rule, reverse: draw.flag() },
            with_d: draw.flag(),
            with_state: draw.flag(),
            layout: Layout { time_contiguous: draw.flag(), column_slice: draw.flag() },
            ..Self::default()
        }
    }

    pub fn sequences(&self) -> usize {
        self.cu_seqlens.as_ref().map_or(self.batch, |cuts| cuts.len() - 1)
    }
}

#[derive(Clone)]
pub struct Case<T> {
    pub shape: Shape,
    pub u: Strided<T>,
    pub d_out: Strided<T>,
    pub log_delta: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub d: Vec<f32>,
    pub state: Vec<f32>,
    pub d_state: Vec<f32>,
}

impl<T: Element> Case<T> {
    pub fn new(shape: Shape, draw: &mut Draw) -> Self {
        let activation = [shape.batch, shape.length, shape.d_inner];
        let mut values = |layout| {
            let mut numbers = draw.uniform::<f32>(activation.iter().product(), -1.0, 1.0).into_iter();
            Strided::new(activation, layout, || numbers.next().expect("as many as there are"))
        };
        let (u, d_out) = (values(shape.layout), values(shape.layout));
        let pairs = shape.d_inner * shape.d_state;
        let rates = draw.uniform::<f32>(pairs, shape.decay[0].ln(), shape.decay[1].ln());
        let frequencies = draw.uniform::<f32>(pairs, -shape.fastest, shape.fastest);
        let a = rates.iter().zip(frequencies).flat_map(|(rate, frequency)| [-rate.exp(), frequency]).collect();
        let states = 2 * shape.sequences() * pairs;
        Self {
            u,
            d_out,
            log_delta: draw.uniform(shape.d_inner, shape.delta[0].ln(), shape.delta[1].ln()),
            a,
            b: draw.uniform(2 * pairs, -1.0, 1.0),
            c: draw.uniform(2 * pairs, -1.0, 1.0),
            d: draw.uniform(shape.d_inner, -1.0, 1.0),
            state: draw.uniform(states, -1.0, 1.0),
            d_state: draw.uniform(states, -1.0, 1.0),
            shape,
        }
    }

    /// The same with other signs, and with `B` and `C` turned by quarters: its sums have terms of the same size, and
    /// where those of one happen to cancel, those of another do not.
    pub fn with_other_signs(&self, draw: &mut Draw) -> Self {
        let mut case = self.clone();
        for tensor in [&mut case.u, &mut case.d_out] {
            for x in &mut tensor.data {
                *x = if draw.flag() { *x } else { T::from_f32(-x.to_f32()) };
            }
        }
        for x in case.state.iter_mut().chain(&mut case.d_state).chain(&mut case.d) {
            *x = if draw.flag() { *x } else { -*x };
        }
        for pair in case.b.as_chunks_mut().0.iter_mut().chain(case.c.as_chunks_mut().0) {
            let [re, im] = *pair;
            *pair = draw.one_of(&[[re, im], [-re, -im], [-im, re], [im, -re]]);
        }
        case
    }

    fn state_shape(&self) -> [usize; 3] {
        [self.shape.sequences(), self.shape.d_inner, 2 * self.shape.d_state]
    }

    pub fn inputs(&self) -> Inputs<'_, T> {
        let complex = |data| View::new(data, [self.shape.d_inner, 2 * self.shape.d_state]);
        Inputs {
            d: self.shape.with_d.then(|| View::new(&self.d, [self.shape.d_inner])),
            initial_state: self.shape.with_state.then(|| View::new(&self.state, self.state_shape())),
            cu_seqlens: self.shape.cu_seqlens.as_deref(),
            options: self.shape.options,
            ..Inputs::new(
                self.u.view(),
                View::new(&self.log_delta, [self.shape.d_inner]),
                complex(&self.a),
                complex(&self.b),
                complex(&self.c),
            )
        }
    }

    pub fn d_outputs(&self) -> OutputGradients<'_, T> {
        let d_final_state = self.shape.with_state.then(|| View::new(&self.d_state, self.state_shape()));
        OutputGradients { d_out: self.d_out.view(), d_final_state }
    }
}
