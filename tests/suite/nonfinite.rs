//! NaN and infinity in a single element of an input reach what depends on it and nothing else, in the references and on the
//! processor.
//!
//! What depends on an element is found by changing it to other finite numbers and looking at what changes in the reference.
//! So no list of dependencies has to be kept that could be wrong.

use std::collections::BTreeMap;

use selective_scan::scan::{self, ProjectionGradient};
use selective_scan::{Discretization, Projection, View, ViewMut, conv, state_update};

use crate::support::draw::{Draw, seeded};

type Tensors = BTreeMap<&'static str, Vec<f32>>;
type Results = BTreeMap<&'static str, Vec<f64>>;

/// An operator at one size, with one choice of options and of the inputs that are there.
struct Operator {
    name: String,
    inputs: Tensors,
    reference: Box<dyn Fn(&Tensors) -> Results>,
    fast: Box<dyn Fn(&Tensors) -> Results>,
}

/// Turns the signs of some. (None is zero, with which no finite factor shows what depends on it.)
fn turn_signs(draw: &mut Draw, values: &mut [f32]) {
    values.iter_mut().filter(|_| draw.flag()).for_each(|x| *x = -*x);
}

fn widen(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

impl Operator {
    /// Poisons some elements of each input in turn.
    fn check(&self, draw: &mut Draw, seed: u64) {
        let clean = (self.reference)(&self.inputs);
        let clean_fast = (self.fast)(&self.inputs);
        for (&name_of, values) in &self.inputs {
            for _ in 0..3 {
                let at = draw.one_of(&(0..values.len()).collect::<Vec<_>>());
                let with = |value: f32| {
                    let mut inputs = self.inputs.clone();
                    inputs.get_mut(name_of).expect("an input")[at] = value;
                    inputs
                };
                // Three others, of both signs, so that what has a zero slope at one has none at another.
                let others = [0.37, -0.61, 1.93].map(|other| (self.reference)(&with(values[at] + other)));
                let depends = |result: &str, i: usize| {
                    others.iter().any(|other| other[result][i].to_bits() != clean[result][i].to_bits())
                };
                for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let (reference, fast) = ((self.reference)(&with(poison)), (self.fast)(&with(poison)));
                    for (&result, values) in &reference {
                        for (i, &exact) in values.iter().enumerate() {
                            let ours = fast[result][i];
                            let what = || {
                                let name = &self.name;
                                format!("{result}[{i}] with {name_of}[{at}] = {poison}; {name}; SEED={seed}")
                            };
                            if !depends(result, i) {
                                let (without, fast_without) = (clean[result][i], clean_fast[result][i]);
                                assert_eq!(
                                    exact.to_bits(),
                                    without.to_bits(),
                                    "{exact} for {without} in the reference: {}",
                                    what()
                                );
                                assert_eq!(
                                    ours.to_bits(),
                                    fast_without.to_bits(),
                                    "{ours} for {fast_without}: {}",
                                    what()
                                );
                            } else if poison.is_nan() {
                                assert!(
                                    exact.is_nan() && ours.is_nan(),
                                    "{exact} in the reference, {ours}: {}",
                                    what()
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Few steps, so that what a step does to the last state has not decayed below its last bit.
fn scans(draw: &mut Draw) -> Operator {
    let [batch, len, d, n] =
        [draw.one_of(&[1, 2]), draw.one_of(&[1, 2, 5]), draw.one_of(&[2, 4, 18]), draw.one_of(&[1, 3])];
    let groups = draw.one_of(&[1, 2]);
    let (constant, hold, softplus, reverse) = ([draw.flag(), draw.flag()], draw.flag(), draw.flag(), draw.flag());
    let mut inputs = Tensors::new();
    let mut add = |draw: &mut Draw, name, len, low, high| inputs.insert(name, draw.uniform::<f32>(len, low, high));
    add(draw, "u", batch * len * d, 0.2, 1.0);
    add(draw, "delta", batch * len * d, 0.2, 0.8);
    add(draw, "a", d * n, -1.5, -0.2);
    for (name, constant) in ["b", "c"].into_iter().zip(constant) {
        add(draw, name, if constant { d * n } else { batch * len * groups * n }, 0.2, 1.0);
    }
    add(draw, "d_out", batch * len * d, 0.2, 1.0);
    add(draw, "initial_state", batch * d * n, 0.2, 1.0);
    for (name, len) in [("z", batch * len * d), ("d", d), ("delta_bias", d), ("d_final_state", batch * d * n)] {
        if draw.flag() {
            add(draw, name, len, 0.2, 1.0);
        }
    }
    turn_signs(draw, inputs.get_mut("u").expect("it is there"));
    let options = scan::Options {
        delta_softplus: softplus,
        discretization: if hold { Discretization::ZeroOrderHold } else { Discretization::Euler },
        reverse,
        ..Default::default()
    };
    let name = format!("scan {:?} {groups} {constant:?} {options:?} {:?}", [batch, len, d, n], inputs.keys());
    let view = move |t: &Tensors, f: &dyn Fn(&scan::Inputs<f32>, scan::OutputGradients<f32>) -> Results| {
        let activation = [batch, len, d];
        let projection = |name: &str, constant: bool| -> Projection<f32> {
            match constant {
                true => View::new(&t[name][..], [d, n]).into(),
                false => View::new(&t[name][..], [batch, len, groups, n]).into(),
            }
        };
        let inputs = scan::Inputs {
            z: t.get("z").map(|z| View::new(z, activation)),
            d: t.get("d").map(|x| View::new(x, [d])),
            delta_bias: t.get("delta_bias").map(|x| View::new(x, [d])),
            initial_state: t.get("initial_state").map(|x| View::new(x, [batch, d, n])),
            options,
            ..scan::Inputs::new(
                View::new(&t["u"], activation),
                View::new(&t["delta"], activation),
                View::new(&t["a"], [d, n]),
                projection("b", constant[0]),
                projection("c", constant[1]),
            )
        };
        let d_final_state = t.get("d_final_state").map(|x| View::new(x, [batch, d, n]));
        f(&inputs, scan::OutputGradients { d_out: View::new(&t["d_out"], activation), d_final_state })
    };
    let reference = move |t: &Tensors| {
        view(t, &|inputs, d_outputs| {
            let output = scan::reference::forward(inputs).expect("valid");
            let g = scan::reference::backward(inputs, d_outputs).expect("valid");
            let projection = |g: ProjectionGradient<f64, f64>| match g {
                ProjectionGradient::Varying(x) | ProjectionGradient::Constant(x) => x,
            };
            let mut all = Results::from([
                ("out", output.out),
                ("final_state", output.final_state),
                ("d_u", g.u),
                ("d_delta", g.delta),
                ("d_a", g.a),
                ("d_b", projection(g.b)),
                ("d_c", projection(g.c)),
            ]);
            for (name, x) in
                [("d_z", g.z), ("d_d", g.d), ("d_delta_bias", g.delta_bias), ("d_initial_state", g.initial_state)]
            {
                all.extend(x.map(|x| (name, x)));
            }
            all
        })
    };
    let fast = move |t: &Tensors| {
        view(t, &|inputs, d_outputs| {
            let (output, checkpoints) = inputs.forward_with_checkpoints().expect("valid");
            let g = inputs.backward(&checkpoints, d_outputs).expect("valid");
            let projection = |g: ProjectionGradient<f32>| match g {
                ProjectionGradient::Varying(x) | ProjectionGradient::Constant(x) => widen(&x),
            };
            let mut all = Results::from([
                ("out", widen(&output.out)),
                ("final_state", widen(&output.final_state)),
                ("d_u", widen(&g.u)),
                ("d_delta", widen(&g.delta)),
                ("d_a", widen(&g.a)),
                ("d_b", projection(g.b)),
                ("d_c", projection(g.c)),
            ]);
            for (name, x) in
                [("d_z", g.z), ("d_d", g.d), ("d_delta_bias", g.delta_bias), ("d_initial_state", g.initial_state)]
            {
                all.extend(x.map(|x| (name, widen(&x))));
            }
            all
        })
    };
    Operator { name, inputs, reference: Box::new(reference), fast: Box::new(fast) }
}

fn updates(draw: &mut Draw) -> Operator {
    let [batch, tokens, d, n] =
        [draw.one_of(&[1, 2]), draw.one_of(&[1, 3]), draw.one_of(&[2, 4, 18]), draw.one_of(&[1, 3, 16])];
    let (hold, softplus) = (draw.flag(), draw.flag());
    let mut inputs = Tensors::new();
    let mut add = |draw: &mut Draw, name, len, low, high| inputs.insert(name, draw.uniform::<f32>(len, low, high));
    add(draw, "u", batch * tokens * d, 0.2, 1.0);
    add(draw, "delta", batch * tokens * d, 0.2, 0.8);
    add(draw, "a", d * n, -1.5, -0.2);
    add(draw, "b", batch * tokens * n, 0.2, 1.0);
    add(draw, "c", batch * tokens * n, 0.2, 1.0);
    add(draw, "state", batch * d * n, 0.2, 1.0);
    for (name, len) in [("z", batch * tokens * d), ("d", d), ("delta_bias", d)] {
        if draw.flag() {
            add(draw, name, len, 0.2, 1.0);
        }
    }
    turn_signs(draw, inputs.get_mut("u").expect("it is there"));
    let options = state_update::Options {
        delta_softplus: softplus,
        discretization: if hold { Discretization::ZeroOrderHold } else { Discretization::Euler },
    };
    let name = format!("update {:?} {options:?} {:?}", [batch, tokens, d, n], inputs.keys());
    let view = move |t: &Tensors, f: &dyn Fn(&state_update::Inputs<f32>) -> Results| {
        let activation = [batch, tokens, d];
        f(&state_update::Inputs {
            z: t.get("z").map(|z| View::new(z, activation)),
            d: t.get("d").map(|x| View::new(x, [d])),
            delta_bias: t.get("delta_bias").map(|x| View::new(x, [d])),
            options,
            ..state_update::Inputs::new(
                View::new(&t["u"], activation),
                View::new(&t["delta"], activation),
                View::new(&t["a"], [d, n]),
                View::new(&t["b"], [batch, tokens, 1, n]),
                View::new(&t["c"], [batch, tokens, 1, n]),
            )
        })
    };
    let reference = move |t: &Tensors| {
        view(t, &|inputs| {
            let output = state_update::reference::update(inputs, View::new(&t["state"], [batch, d, n])).expect("valid");
            Results::from([("out", output.out), ("token_states", output.token_states)])
        })
    };
    let fast = move |t: &Tensors| {
        view(t, &|inputs| {
            let mut state = t["state"].clone();
            let output = inputs.update_with_token_states(ViewMut::new(&mut state, [batch, d, n])).expect("valid");
            Results::from([("out", widen(&output.out)), ("token_states", widen(&output.token_states))])
        })
    };
    Operator { name, inputs, reference: Box::new(reference), fast: Box::new(fast) }
}

fn convolutions(draw: &mut Draw) -> Operator {
    let [batch, len, d, width] =
        [draw.one_of(&[1, 2]), draw.one_of(&[1, 2, 5, 40]), draw.one_of(&[2, 18]), draw.one_of(&[2, 4, 8])];
    let options = conv::Options { silu: draw.flag(), reverse: draw.flag() };
    let mut inputs = Tensors::new();
    let mut add = |draw: &mut Draw, name, len, low, high| inputs.insert(name, draw.uniform::<f32>(len, low, high));
    add(draw, "x", batch * len * d, 0.2, 1.0);
    add(draw, "weight", d * width, 0.2, 1.0);
    add(draw, "d_out", batch * len * d, 0.2, 1.0);
    add(draw, "initial_state", batch * d * (width - 1), 0.2, 1.0);
    for (name, len) in [("bias", d), ("d_final_state", batch * d * (width - 1))] {
        if draw.flag() {
            add(draw, name, len, 0.2, 1.0);
        }
    }
    let name = format!("convolution {:?} {options:?} {:?}", [batch, len, d, width], inputs.keys());
    let view = move |t: &Tensors, f: &dyn Fn(&conv::Inputs<f32>, conv::OutputGradients<f32>) -> Results| {
        let (activation, states) = ([batch, len, d], [batch, width - 1, d]);
        let inputs = conv::Inputs {
            bias: t.get("bias").map(|x| View::new(x, [d])),
            initial_state: t.get("initial_state").map(|x| View::new(x, states)),
            options,
            ..conv::Inputs::new(View::new(&t["x"], activation), View::new(&t["weight"], [d, width]))
        };
        let d_final_state = t.get("d_final_state").map(|x| View::new(x, states));
        f(&inputs, conv::OutputGradients { d_out: View::new(&t["d_out"], activation), d_final_state })
    };
    let reference = move |t: &Tensors| {
        view(t, &|inputs, d_outputs| {
            let output = conv::reference::forward(inputs).expect("valid");
            let g = conv::reference::backward(inputs, d_outputs).expect("valid");
            let mut all = Results::from([
                ("out", output.out),
                ("final_state", output.final_state),
                ("d_x", g.x),
                ("d_weight", g.weight),
            ]);
            all.extend(g.bias.map(|x| ("d_bias", x)));
            all.extend(g.initial_state.map(|x| ("d_initial_state", x)));
            all
        })
    };
    let fast = move |t: &Tensors| {
        view(t, &|inputs, d_outputs| {
            let output = inputs.forward().expect("valid");
            let g = inputs.backward(d_outputs).expect("valid");
            let mut all = Results::from([
                ("out", widen(&output.out)),
                ("final_state", widen(&output.final_state)),
                ("d_x", widen(&g.x)),
                ("d_weight", widen(&g.weight)),
            ]);
            all.extend(g.bias.map(|x| ("d_bias", widen(&x))));
            all.extend(g.initial_state.map(|x| ("d_initial_state", widen(&x))));
            all
        })
    };
    Operator { name, inputs, reference: Box::new(reference), fast: Box::new(fast) }
}

fn check(make: fn(&mut Draw) -> Operator) {
    let (_, seed) = seeded();
    let mut draw = Draw::new(seed);
    for _ in 0..100 {
        make(&mut draw).check(&mut draw, seed);
    }
}

#[test]
fn of_the_scan() {
    check(scans);
}

#[test]
fn of_the_state_update() {
    check(updates);
}

#[test]
fn of_the_convolution() {
    check(convolutions);
}

/// Infinity is multiplied by no zero that stands for what is not there: the slope by A of Euler's input.
#[test]
fn of_an_input_that_is_not_the_decay() {
    let (one, u) = ([1.0f32; 2], [1.0f32, f32::INFINITY]);
    let (activation, varying) = ([1, 2, 1], View::new(&one, [1, 2, 1, 1]));
    let inputs = scan::Inputs::new(
        View::new(&u, activation),
        View::new(&one, activation),
        View::new(&[-1.0], [1, 1]),
        varying,
        varying,
    );
    let d_out = View::new(&one, activation);
    let gradients = scan::reference::backward(&inputs, d_out).expect("valid");
    // Only the first input reaches A, by the decay of the second step: e^-1.
    assert!((gradients.a[0] - (-1f64).exp()).abs() < 1e-15, "{:?}", gradients.a);
}

/// Without D nothing goes past the states: what comes of them is infinite and not NaN, forward, backward and in an update.
#[test]
fn of_an_absent_skip_connection() {
    let (one, u) = ([1.0f32; 2], [1.0f32, f32::INFINITY]);
    let (activation, varying) = ([1, 2, 1], View::new(&one, [1, 2, 1, 1]));
    let (a, z) = (View::new(&[-1.0], [1, 1]), View::new(&[0.0f32], [1, 1, 1]));
    let update = state_update::Inputs::new(View::new(&u, activation), View::new(&one, activation), a, varying, varying);
    assert_eq!(state_update::reference::update(&update, z).expect("valid").out, [1.0, f64::INFINITY]);
    let inputs = scan::Inputs::new(View::new(&u, activation), View::new(&one, activation), a, varying, varying);
    assert_eq!(scan::reference::forward(&inputs).expect("valid").out, [1.0, f64::INFINITY]);
    let d_out = [f32::INFINITY, 1.0];
    let finite = scan::Inputs { u: View::new(&one, activation), ..inputs };
    let gradients = scan::reference::backward(&finite, View::new(&d_out, activation)).expect("valid");
    assert_eq!(gradients.u, [f64::INFINITY, 1.0]);
}

/// Zero-order hold where ΔA is infinite: the input's weight (exp(ΔA) - 1)/A is -1/A then, and its slope by A 1/A².
#[test]
fn of_a_hold_that_never_ends() {
    let one = [1.0f32];
    let (activation, varying) = ([1, 1, 1], View::new(&one, [1, 1, 1, 1]));
    let hold = |delta: &[f32], a: &[f32]| {
        let inputs = scan::Inputs {
            options: scan::Options { discretization: Discretization::ZeroOrderHold, ..Default::default() },
            ..scan::Inputs::new(
                View::new(&one, activation),
                View::new(delta, activation),
                View::new(a, [1, 1]),
                varying,
                varying,
            )
        };
        let gradients = scan::reference::backward(&inputs, View::new(&one, activation)).expect("valid");
        (scan::reference::forward(&inputs).expect("valid").out[0], gradients.a[0])
    };
    assert_eq!(hold(&[f32::INFINITY], &[-2.0]).0, 0.5);
    assert_eq!(hold(&[400.0], &[-2.0]), (0.5, 0.25));
    assert_eq!(hold(&[1.0], &[f32::NEG_INFINITY]), (0.0, 0.0));
}
