//! The scan in candle's own operators, as one would write it without this crate: `exp(ΔA)` and `ΔBu` of every step first,
//! `(B, L, D, N)` each, then step by step.

use candle_core::{D, DType, Device, Result as CandleResult, Tensor, Var};
use selective_scan::{View, scan};

use crate::Result;
use crate::case::Case;
use crate::timing::{Prepared, Work};

struct Inputs {
    u: Var,
    delta: Var,
    a: Var,
    b: Var,
    c: Var,
    z: Var,
    d: Var,
    bias: Var,
}

impl Inputs {
    fn draw(case: &Case, device: &Device) -> CandleResult<Self> {
        let Case { batch, len, d_inner, last: d_state, .. } = *case;
        let activation = |low, high| Var::rand(low, high, (batch, len, d_inner), device);
        let projection = || Var::rand(-1f32, 1.0, (batch, len, d_state), device);
        let a = Tensor::arange(1f32, (d_state + 1) as f32, device)?.neg()?.broadcast_as((d_inner, d_state))?;
        Ok(Self {
            u: activation(-1f32, 1.0)?,
            delta: activation(-5f32, -1.0)?,
            a: Var::from_tensor(&a.contiguous()?)?,
            b: projection()?,
            c: projection()?,
            z: activation(-2f32, 2.0)?,
            d: Var::rand(0.5f32, 1.0, d_inner, device)?,
            bias: Var::rand(-0.5f32, 0.5, d_inner, device)?,
        })
    }

    fn scan(&self) -> CandleResult<Tensor> {
        let (batch, len, d_inner) = self.u.dims3()?;
        let delta = (self.delta.broadcast_add(&self.bias)?.exp()? + 1.0)?.log()?;
        let decay = delta.unsqueeze(3)?.broadcast_mul(&self.a)?.exp()?;
        let entering = (&delta * self.u.as_tensor())?.unsqueeze(3)?.broadcast_mul(&self.b.unsqueeze(2)?)?;
        let mut h = Tensor::zeros((batch, d_inner, self.a.dim(1)?), DType::F32, self.u.device())?;
        let mut ys = Vec::with_capacity(len);
        for t in 0..len {
            let at = |x: &Tensor| x.narrow(1, t, 1)?.squeeze(1);
            h = ((at(&decay)? * h)? + at(&entering)?)?;
            ys.push(h.broadcast_mul(&self.c.narrow(1, t, 1)?)?.sum(D::Minus1)?);
        }
        let y = (Tensor::stack(&ys, 1)? + self.u.broadcast_mul(&self.d)?)?;
        y * self.z.silu()?
    }
}

/// That it is the same operator, by the crate's own on the CPU.
fn check(device: &Device) -> Result<()> {
    let inputs = Inputs::draw(&Case::parse("candle forward f32 2 9 8 4")?, device)?;
    let host = |x: &Tensor| x.flatten_all()?.to_vec1::<f32>();
    let Inputs { u, delta, a, b, c, z, d, bias } = &inputs;
    let [u, delta, a, b, c, z, d, bias] =
        [host(u)?, host(delta)?, host(a)?, host(b)?, host(c)?, host(z)?, host(d)?, host(bias)?];
    let (activation, projection) = ([2, 9, 8], [2, 9, 1, 4]);
    let wanted = scan::Inputs {
        z: Some(View::new(&z, activation)),
        d: Some(View::new(&d, [8])),
        delta_bias: Some(View::new(&bias, [8])),
        options: scan::Options { delta_softplus: true, ..Default::default() },
        ..scan::Inputs::new(
            View::new(&u, activation),
            View::new(&delta, activation),
            View::new(&a, [8, 4]),
            View::new(&b, projection),
            View::new(&c, projection),
        )
    }
    .forward()?;
    let got = host(&inputs.scan()?)?;
    let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
    let error = norm(&mut got.iter().zip(&wanted.out).map(|(got, wanted)| got - wanted));
    if error < 1e-4 * norm(&mut wanted.out.iter().copied()) {
        return Ok(());
    }
    Err("candle's scan is not the crate's".into())
}

/// Directions `forward`, and `both`: with the gradients of all inputs, by candle's own differentiation.
pub fn prepare(case: &Case) -> Result<Prepared> {
    case.finish()?;
    let is_backward = match case.direction.as_str() {
        "forward" => false,
        "both" => true,
        other => return Err(format!("candle's scan has no direction `{other}`").into()),
    };
    let device = Device::new_cuda(0)?;
    check(&device)?;
    let stream = device.as_cuda_device()?.cuda_stream();
    // What it stores far exceeds the cache, so that there is no need to rotate.
    let inputs = Inputs::draw(case, &device)?;
    Ok(Prepared {
        stream,
        sets: 1,
        can_capture: false,
        work: Work { state_steps: (case.count() * case.last) as f64, ..Work::default() },
        run: Box::new(move |_| {
            let out = if is_backward { inputs.scan()? } else { inputs.scan()?.detach() };
            if is_backward {
                out.sum_all()?.backward()?;
            }
            Ok(())
        }),
    })
}
