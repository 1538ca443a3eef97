//! AdamW over many parameters, on slices and on a GPU.

#[cfg(feature = "cuda")]
mod gpu;

use std::collections::BTreeMap;

use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selective_scan::optimizer::{cpu, reference, *};
use selective_scan::{DType, Element, Isa, View, ViewMut};

use crate::support::draw::seeded;

/// Elements of some type, of which the tensor's are those from `offset` on.
#[derive(Debug, Clone, PartialEq)]
enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Data {
    fn narrow(dtype: DType, values: &[f32]) -> Self {
        fn to<T: Element>(values: &[f32]) -> Vec<T> {
            values.iter().map(|&x| T::from_f32(x)).collect()
        }
        match dtype {
            DType::F32 => Self::F32(values.to_vec()),
            DType::F16 => Self::F16(to(values)),
            _ => Self::Bf16(to(values)),
        }
    }

    fn widen(&self) -> Vec<f32> {
        fn from<T: Element>(values: &[T]) -> Vec<f32> {
            values.iter().map(|x| x.to_f32()).collect()
        }
        match self {
            Self::F32(values) => from(values),
            Self::F16(values) => from(values),
            Self::Bf16(values) => from(values),
        }
    }

    fn bits(&self) -> Vec<u32> {
        self.widen().into_iter().map(f32::to_bits).collect()
    }

    fn gradient(&self, offset: usize) -> Gradient<'_> {
        fn view<T: Element>(data: &[T], offset: usize) -> View<'_, T, 1> {
            View { data, offset, shape: [data.len() - offset], strides: [1] }
        }
        match self {
            Self::F32(data) => Gradient::F32(view(data, offset)),
            Self::F16(data) => Gradient::F16(view(data, offset)),
            Self::Bf16(data) => Gradient::Bf16(view(data, offset)),
        }
    }

    fn values(&mut self, offset: usize) -> Values<'_> {
        fn view<T: Element>(data: &mut [T], offset: usize) -> ViewMut<'_, T, 1> {
            let shape = [data.len() - offset];
            ViewMut { data, offset, shape, strides: [1] }
        }
        match self {
            Self::F32(data) => Values::F32(view(data, offset)),
            Self::F16(data) => Values::F16(view(data, offset)),
            Self::Bf16(data) => Values::Bf16(view(data, offset)),
        }
    }
}

/// Parameters and all that is kept of them.
#[derive(Debug, Clone)]
struct Case {
    options: Options,
    dtypes: Vec<(DType, DType)>,
    offsets: Vec<usize>,
    groups: Vec<Group>,
    layout: Layout,
    values: Vec<Data>,
    mean: Vec<f32>,
    mean_square: Vec<f32>,
    master: Vec<f32>,
    status: Status,
}

/// What takes a step, and gives the norm: a device.
type Step = fn(&mut Case, &[Data], f64) -> f64;

/// All pairs of types, sizes around what a block of threads and a task work on, and more parameters than one launch takes.
fn sizes() -> Vec<(DType, DType, usize)> {
    let pairs = [
        (DType::F32, DType::F32),
        (DType::F16, DType::F16),
        (DType::F16, DType::F32),
        (DType::Bf16, DType::Bf16),
        (DType::Bf16, DType::F32),
    ];
    let lens = [0, 1, 3, 4, 17, 64, 300, 2047, 2048, 2049, 5000];
    let mut sizes: Vec<_> = pairs.iter().flat_map(|&(p, g)| lens.map(|len| (p, g, len))).collect();
    sizes.extend(pairs.iter().map(|&(p, g)| (p, g, 16_385)));
    sizes.extend((0..130).map(|i| (pairs[i % 5].0, pairs[i % 5].1, 1 + i % 3)));
    sizes
}

impl Case {
    fn new(random: &mut StdRng, sizes: &[(DType, DType, usize)], options: Options) -> Self {
        let layout = Layout::new(sizes.iter().map(|&(dtype, _, len)| (dtype, len))).unwrap();
        let mut case = Self {
            options,
            dtypes: sizes.iter().map(|&(p, g, _)| (p, g)).collect(),
            // Some begin where no vector may.
            offsets: sizes.iter().map(|_| random.random_range(0..8) / 4 * random.random_range(1..4)).collect(),
            groups: Vec::new(),
            mean: vec![0.0; layout.moments],
            mean_square: vec![0.0; layout.moments],
            master: vec![0.0; layout.masters],
            values: Vec::new(),
            status: Status::default(),
            layout,
        };
        for (i, &(dtype, _, len)) in sizes.iter().enumerate() {
            let values: Vec<f32> = (0..case.offsets[i] + len).map(|_| random.random_range(-1.0..1.0)).collect();
            let values = Data::narrow(dtype, &values);
            if dtype != DType::F32 {
                let master = &mut case.master[case.layout.places[i].master..][..len];
                master.copy_from_slice(&values.widen()[case.offsets[i]..]);
            }
            case.values.push(values);
            let learning_rate = if i % 3 == 0 { 0.25 } else { 1.0 };
            case.groups.push(Group { learning_rate, weight_decay: if i % 2 == 0 { 0.1 } else { 0.0 } });
        }
        case
    }

    /// A gradient for each parameter.
    fn gradients(&self, random: &mut StdRng) -> Vec<Data> {
        let sizes = self.layout.places.iter().zip(&self.dtypes).zip(&self.offsets);
        sizes
            .map(|((place, &(_, dtype)), &offset)| {
                let values: Vec<f32> = (0..offset + place.len).map(|_| random.random_range(-1.0..1.0)).collect();
                Data::narrow(dtype, &values)
            })
            .collect()
    }

    /// The parameters with what lies between them left out, in full where there are masters.
    fn exact(&self) -> Vec<Vec<f32>> {
        let each = |i: usize| {
            let place = self.layout.places[i];
            match self.dtypes[i].0 {
                DType::F32 => self.values[i].widen()[self.offsets[i]..].to_vec(),
                _ => self.master[place.master..][..place.len].to_vec(),
            }
        };
        (0..self.values.len()).map(each).collect()
    }

    /// Everything, to the bit.
    fn bits(&self) -> Vec<Vec<u32>> {
        let flat = [&self.mean, &self.mean_square, &self.master].map(|flat| flat.iter().map(|x| x.to_bits()).collect());
        self.values.iter().map(Data::bits).chain(flat).collect()
    }
}

fn step_with(isa: Isa, case: &mut Case, gradients: &[Data], learning_rate: f64) -> f64 {
    let Case { options, offsets, groups, layout, values, mean, mean_square, master, status, .. } = case;
    let gradients: Vec<_> = gradients.iter().zip(&*offsets).map(|(data, &offset)| data.gradient(offset)).collect();
    let factors = cpu::begin(options, &gradients, status).unwrap();
    let parameters = values.iter_mut().enumerate().map(|(i, values)| Parameter {
        values: values.values(offsets[i]),
        gradient: gradients[i],
        place: layout.places[i],
        group: groups[i],
    });
    let moments = Moments { mean: &mut mean[..], mean_square: &mut mean_square[..], master: &mut master[..] };
    cpu::update_with(isa, options, learning_rate, &factors, parameters, moments).unwrap();
    factors.norm()
}

fn step_on_cpu(case: &mut Case, gradients: &[Data], learning_rate: f64) -> f64 {
    step_with(Isa::best(), case, gradients, learning_rate)
}

fn random() -> StdRng {
    let (_, seed) = seeded();
    println!("SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// What was computed, and what it should be.
type Pairs = (Vec<f32>, Vec<f64>);

/// The norm of a difference over a norm.
fn error(got: &[f32], want: &[f64]) -> f64 {
    let difference: f64 = got.iter().zip(want).map(|(got, want)| (f64::from(*got) - want).powi(2)).sum();
    (difference / want.iter().map(|x| x * x).sum::<f64>()).sqrt()
}

/// Values of up to 1 are rounded by 2^-25 at most, twice in each of ten steps: by the root of twenty of it, 1.3e-7, if roundings
/// are independent. Steps of 2.5e-3 or more that go to and fro move them by some 3e-3, of which that is 5e-5; twice that is
/// granted. The moments have a few roundings of 6e-8 in each step, of which the last weigh most.
fn agrees_with_the_reference(step: Step, sizes: &[(DType, DType, usize)]) {
    let mut random = random();
    for (clip, scale, divisor) in [(None, 1.0, 1.0), (Some(3.0), 1.0, 2.5), (Some(1e9), 1024.0, 3.0)] {
        // Beside gradients of this size, so that it counts.
        let eps = 1e-3 / (f64::from(scale) * divisor);
        let options = Options { clip, eps, beta2: 0.9, divisor, ..Options::default() };
        let mut case = Case::new(&mut random, sizes, options);
        case.status.scale = scale;
        let widen = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        let start = case.exact();
        let parameters = start.iter().zip(&case.groups);
        let mut exact: Vec<_> =
            parameters.map(|(values, &group)| reference::Parameter::new(widen(values), group)).collect();
        for t in 1..=10 {
            let gradients = case.gradients(&mut random);
            let norm = step(&mut case, &gradients, 0.01);
            let gradients: Vec<_> =
                gradients.iter().zip(&case.offsets).map(|(data, &offset)| widen(&data.widen()[offset..])).collect();
            let expected = reference::step(&options, 0.01, t, scale.into(), &mut exact, &gradients);
            // The norm is given as f32.
            assert!((norm - expected).abs() <= 1.2e-7 * expected, "{norm} for {expected}");
        }
        assert_eq!((case.status.taken, case.status.skipped), (10, 0));
        let got = case.exact();
        // Of what was moved, of means and of mean squares. Small parameters are taken together, as one element may come back to
        // where it was, which leaves nothing of the movement and all of the rounding.
        let mut pairs: BTreeMap<String, [Pairs; 3]> = BTreeMap::new();
        for (i, expected) in exact.iter().enumerate() {
            let (place, dtypes) = (case.layout.places[i], case.dtypes[i]);
            let moved = got[i].iter().zip(&start[i]).map(|(x, x0)| x - x0);
            let wanted = expected.values.iter().zip(&start[i]).map(|(x, x0)| x - f64::from(*x0));
            let [mean, square] = [&case.mean, &case.mean_square].map(|flat| &flat[place.moments..][..place.len]);
            let size = if place.len < 64 { "few".into() } else { format!("{i}: {}", place.len) };
            let [of_moved, of_mean, of_square] = pairs.entry(format!("{dtypes:?}, {size} elements")).or_default();
            of_moved.0.extend(moved);
            of_moved.1.extend(wanted);
            for ((to, exact), from) in
                [(of_mean, &expected.mean), (of_square, &expected.mean_square)].into_iter().zip([mean, square])
            {
                to.0.extend(from);
                to.1.extend(exact);
            }
            // The parameter is the rounded master.
            let rounded = Data::narrow(dtypes.0, &got[i]);
            assert_eq!(case.values[i].bits()[case.offsets[i]..], rounded.bits(), "{clip:?}, parameter {i}");
        }
        for (what, pairs) in &pairs {
            let errors = pairs.each_ref().map(|(got, wanted)| error(got, wanted));
            let fine = errors[0] <= 1e-4 && errors[1] <= 1e-6 && errors[2] <= 1e-6;
            assert!(fine, "{clip:?}, {what}: {errors:?}");
        }
    }
}

/// Steps of 1e-4 on parameters of 1, of which half an epsilon is 2e-3 in bf16 and 2e-4 in f16: they are lost one by one, and not
/// together.
fn small_steps_add_up(step: Step) {
    for dtype in [DType::F16, DType::Bf16] {
        let mut case = Case::new(&mut random(), &[(dtype, dtype, 4)], Options::default());
        case.offsets = vec![0];
        case.groups[0] = Group { learning_rate: 1.0, weight_decay: 0.0 };
        case.values[0] = Data::narrow(dtype, &[1.0; 4]);
        case.master = vec![1.0; 4];
        let gradients = [Data::narrow(dtype, &[0.5; 4])];
        step(&mut case, &gradients, 1e-4);
        assert_eq!(case.values[0].widen(), [1.0; 4], "{dtype:?}: a step is less than half an epsilon");
        for _ in 1..100 {
            step(&mut case, &gradients, 1e-4);
        }
        // A hundred steps, each as long as the learning rate, and half an epsilon of rounding.
        for value in case.values[0].widen() {
            assert!((value - 0.99).abs() <= 2e-3, "{dtype:?}: {value}");
        }
    }
}

/// One gradient of many that is not finite: nothing changes but the counts. The scale is halved then and doubles later.
fn skips_what_is_not_finite(step: Step) {
    let mut random = random();
    let sizes = [(DType::F32, DType::F32, 40), (DType::Bf16, DType::Bf16, 5000), (DType::F16, DType::F32, 3)];
    let options = Options { clip: Some(1.0), scale_interval: Some(2), ..Options::default() };
    let mut case = Case::new(&mut random, &sizes, options);
    case.status.scale = 8.0;
    let good = case.gradients(&mut random);
    step(&mut case, &good, 0.01);
    assert_eq!(case.status, Status { taken: 1, skipped: 0, streak: 1, scale: 8.0 });
    let before = case.bits();
    for (which, bad) in [(1, f32::NAN), (0, f32::INFINITY), (2, f32::NEG_INFINITY)] {
        let mut gradients = good.clone();
        let mut values = gradients[which].widen();
        *values.last_mut().unwrap() = bad;
        gradients[which] = Data::narrow(case.dtypes[which].1, &values);
        assert!(!step(&mut case, &gradients, 0.01).is_finite());
        assert_eq!(case.bits(), before, "{bad}");
    }
    assert_eq!(case.status, Status { taken: 1, skipped: 3, streak: 0, scale: 1.0 });
    // Not below 1; and it doubles after two steps, and again after two more.
    for (scale, streak) in [(1.0, 1), (2.0, 0), (2.0, 1), (4.0, 0)] {
        step(&mut case, &good, 0.01);
        assert_eq!((case.status.scale, case.status.streak), (scale, streak));
    }
    assert_ne!(case.bits(), before);
    assert_eq!((case.status.taken, case.status.skipped), (5, 3));
}

/// Gradients whose squares no f32 holds are finite all the same.
fn large_gradients_are_finite(step: Step) {
    let options = Options { clip: Some(1.0), ..Options::default() };
    let mut case = Case::new(&mut random(), &[(DType::F32, DType::F32, 8)], options);
    (case.offsets, case.values) = (vec![0], vec![Data::F32(vec![0.5; 8])]);
    let norm = step(&mut case, &[Data::F32(vec![1e30; 8])], 0.01);
    assert!((norm / 8f64.sqrt() - 1e30).abs() <= 1e24, "{norm:e}");
    // Clipped to 1, each is 1/√8; of that the mean has a tenth.
    assert!(case.mean[..8].iter().all(|mean| (mean * 10.0 * 8f32.sqrt() - 1.0).abs() < 1e-5), "{:?}", case.mean);
    assert_eq!((case.status.taken, case.status.skipped), (1, 0));
}

#[test]
fn agrees_with_the_reference_on_slices() {
    agrees_with_the_reference(step_on_cpu, &sizes());
}

#[test]
fn small_steps_add_up_on_slices() {
    small_steps_add_up(step_on_cpu);
}

#[test]
fn skips_what_is_not_finite_on_slices() {
    skips_what_is_not_finite(step_on_cpu);
}

#[test]
fn large_gradients_are_finite_on_slices() {
    large_gradients_are_finite(step_on_cpu);
}

/// On any number of threads, with any instruction set.
#[test]
fn the_bits_are_the_same() {
    let mut random = random();
    let options = Options { clip: Some(1.0), ..Options::default() };
    let case = Case::new(&mut random, &sizes(), options);
    let gradients = [case.gradients(&mut random), case.gradients(&mut random)];
    let mut all = Vec::new();
    for isa in Isa::available() {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut case = case.clone();
            let norms =
                pool.install(|| gradients.each_ref().map(|gradients| step_with(isa, &mut case, gradients, 0.01)));
            all.push((case.bits(), norms.map(f64::to_bits)));
        }
    }
    assert!(all.iter().all(|one| *one == all[0]));
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut random = random();
    let sizes = [(DType::F32, DType::F32, 5), (DType::Bf16, DType::F32, 6)];
    let case = Case::new(&mut random, &sizes, Options::default());
    let gradients = case.gradients(&mut random);
    type Change = fn(&mut [Parameter<'_>], &mut Options, &mut f64);
    let changes: [(&str, Change); 12] = [
        ("beta1", |_, options, _| options.beta1 = 1.0),
        ("beta2", |_, options, _| options.beta2 = f64::NAN),
        ("eps", |_, options, _| options.eps = -1.0),
        ("clip", |_, options, _| options.clip = Some(0.0)),
        ("divisor", |_, options, _| options.divisor = 0.0),
        ("scale_interval", |_, options, _| options.scale_interval = Some(0)),
        ("learning_rate", |_, _, rate| *rate = f64::INFINITY),
        ("weight_decay", |parameters, _, _| parameters[1].group.weight_decay = -0.1),
        ("values", |parameters, _, _| parameters[0].place.len = 4),
        ("gradient", |parameters, _, _| parameters[1].gradient = parameters[0].gradient),
        ("mean", |parameters, _, _| parameters[1].place.moments = 4),
        ("master", |parameters, _, _| parameters[1].place.master = 3),
    ];
    for (word, change) in changes {
        let mut case = case.clone();
        let before = case.bits();
        let Case { mut options, offsets, groups, layout, values, mean, mean_square, master, .. } = case.clone();
        let mut values = values;
        let gradients: Vec<_> = gradients.iter().zip(&offsets).map(|(data, &offset)| data.gradient(offset)).collect();
        let factors = cpu::begin(&options, &gradients, &mut Status::default()).unwrap();
        let mut parameters: Vec<_> = values
            .iter_mut()
            .enumerate()
            .map(|(i, values)| Parameter {
                values: values.values(offsets[i]),
                gradient: gradients[i],
                place: layout.places[i],
                group: groups[i],
            })
            .collect();
        let mut rate = 0.1;
        change(&mut parameters, &mut options, &mut rate);
        let (mut mean, mut mean_square, mut master) = (mean, mean_square, master);
        let moments = Moments { mean: &mut mean[..], mean_square: &mut mean_square[..], master: &mut master[..] };
        let message = cpu::update(&options, rate, &factors, parameters, moments).unwrap_err().to_string();
        assert!(message.starts_with(&format!("`{word}`")), "{word}: {message}");
        (case.values, case.mean, case.mean_square, case.master) = (values, mean, mean_square, master);
        assert_eq!(case.bits(), before, "{word}");
    }
    let (strided, mut status) = ([0f32; 9], Status::default());
    let view = View { strides: [2], ..View::new(&strided, [4]) };
    let refused = cpu::begin(&Options::default(), &[Gradient::F32(view)], &mut status).unwrap_err();
    assert!(refused.to_string().contains("contiguous"), "{refused}");
    assert_eq!(status, Status::default());
    assert!(Layout::new([(DType::F32, usize::MAX)]).is_err());
}
