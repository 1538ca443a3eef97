//! The model of images, against candle's own convolution and the layers by themselves.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use rand::Rng;
use rand::rngs::StdRng;
use selective_scan::nn::{
    AttentionConfig, Backbone, BackboneConfig, MambaConfig, MlpConfig, VisionConfig, VisionModel,
};

use super::{SAME, SAME_GRADIENTS, assert_close, bits, random, refusal, shake, tensor, values};

/// A small model of two layers.
fn config(image: [usize; 2], patch: usize, stride: usize, channels: usize) -> VisionConfig {
    let config = VisionConfig { channels, stride, ..VisionConfig::new(image, patch, 5, 2, 12) };
    let mut config = VisionConfig { class_token: true, ..config };
    if let Some(mamba) = config.backbone.mixer.as_mamba_mut() {
        *mamba = MambaConfig { d_inner: 20, d_state: 5, dt_rank: 3, ..mamba.clone() };
    }
    config
}

fn drawn(config: &VisionConfig, random: &mut StdRng) -> (VisionModel, VarMap) {
    let (mut config, variables) = (config.clone(), VarMap::new());
    config.backbone.mixer.as_mamba_mut().unwrap().seed = random.random();
    let build = || VisionModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    build();
    shake(&variables, random);
    (build(), variables)
}

/// The model by candle's operators around the layers.
fn plain(config: &VisionConfig, variables: &VarMap, images: &Tensor) -> Result<Tensor> {
    let data = variables.data().lock().unwrap();
    let all: HashMap<String, Tensor> = data.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    drop(data);
    // candle's gradient of a convolution wants no pixels beyond the last patch.
    let [rows, columns] = config.grid().map(|count| (count - 1) * config.stride + config.patch);
    let images = images.narrow(2, 0, rows)?.narrow(3, 0, columns)?;
    let conv = images.conv2d(&all["patch_embed.proj.weight"], 0, config.stride, 1, 1)?;
    let patches = conv.flatten_from(2)?.transpose(1, 2)?.broadcast_add(&all["patch_embed.proj.bias"])?;
    let (batch, count, width) = patches.dims3()?;
    let mut rows: Vec<Tensor> = (0..count).map(|at| patches.narrow(1, at, 1)).collect::<Result<_>>()?;
    if config.class_token {
        rows.insert(count / 2, all["cls_token"].broadcast_as((batch, 1, width))?);
    }
    let stream = Tensor::cat(&rows, 1)?.broadcast_add(&all["pos_embed"])?;
    let backbone = Backbone::new(&config.backbone, VarBuilder::from_varmap(variables, DType::F32, &Device::Cpu))?;
    let stream = backbone.forward(&stream)?;
    let features = match config.class_token {
        true => stream.narrow(1, count / 2, 1)?.squeeze(1)?,
        false => (stream.sum(1)? / count as f64)?,
    };
    features.broadcast_matmul(&all["head.weight"].t()?)?.broadcast_add(&all["head.bias"])
}

/// What stands around the layers is a convolution, a concatenation and a matrix product: results and the gradients of
/// every parameter and of the images are those of candle's, whose sums are of the same few numbers in another order.
#[test]
fn it_is_a_convolution_then_the_layers() {
    let mut random = random();
    let cases = [
        // Patches side by side, of an image whose last columns make no patch.
        config([6, 11], 3, 3, 2),
        // Patches that overlap, an odd number of them.
        config([7, 5], 3, 2, 1),
        // One pixel each.
        config([3, 2], 1, 1, 3),
        // A single patch, so that nothing stands before the token.
        config([4, 4], 4, 4, 1),
        VisionConfig { class_token: false, ..config([6, 6], 2, 2, 2) },
    ];
    for config in cases {
        let (model, variables) = drawn(&config, &mut random);
        let [rows, columns] = config.image;
        let images = Var::from_tensor(&tensor(&mut random, &[2, config.channels, rows, columns], 1.0)).unwrap();
        let (got, want) = (model.forward(&images).unwrap(), plain(&config, &variables, &images).unwrap());
        assert_close(&got, &want, SAME, "logits");
        let mask = tensor(&mut random, got.dims(), 1.0);
        let gradients = |logits: &Tensor| (logits * &mask).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (gradients(&got), gradients(&want));
        for (name, variable) in variables.data().lock().unwrap().iter() {
            let gradient = got.get(variable).unwrap_or_else(|| panic!("no gradient of {name}"));
            let want = want.get(variable).unwrap();
            match values(want).iter().all(|&number| number == 0.0) {
                // Of the last layer's A where the token stands first: the scan begins there from a zero state.
                true => assert!(values(gradient).iter().all(|&number| number == 0.0), "{name}"),
                false => assert_close(gradient, want, SAME_GRADIENTS, name),
            }
        }
        assert_close(got.get(&images).unwrap(), want.get(&images).unwrap(), SAME_GRADIENTS, "images");
        let detached = model.detach().unwrap().forward(images.as_detached_tensor().as_ref()).unwrap();
        assert!(!detached.track_op());
        assert_close(&detached, &model.forward(&images).unwrap(), SAME, "detached");
    }
}

/// The token is in the middle: with layers of one direction it sees what stands before it, and with two all of it.
#[test]
fn the_token_sees_both_halves_by_two_directions() {
    let mut random = random();
    for bidirectional in [false, true] {
        let mut config = config([6, 4], 2, 2, 1);
        let mamba = config.backbone.mixer.as_mamba_mut().unwrap();
        (mamba.bidirectional, mamba.average_directions) = (bidirectional, bidirectional);
        let (model, _) = drawn(&config, &mut random);
        let images = tensor(&mut random, &[1, 1, 6, 4], 1.0);
        let before = model.forward(&images).unwrap();
        // Of six patches the first three stand before the token: the upper two rows of pixels, and half of the next two.
        for at in 0..24 {
            let mut spot = vec![0f32; 24];
            spot[at] = 1.0;
            let spot = Tensor::from_vec(spot, (1, 1, 6, 4), &Device::Cpu).unwrap();
            let after = model.forward(&(&images + spot).unwrap()).unwrap();
            let (row, column) = (at / 4, at % 4);
            let stands_before = row < 2 || (row < 4 && column < 2);
            assert_eq!(bits(&after) != bits(&before), bidirectional || stands_before, "{bidirectional}, pixel {at}");
        }
    }
}

#[test]
fn what_is_no_image_is_refused() {
    let (mut random, good) = (random(), config([6, 4], 2, 2, 3));
    let (model, _) = drawn(&good, &mut random);
    for shape in [&[1, 3, 6, 5][..], &[1, 1, 6, 4], &[3, 6, 4], &[1, 3, 4, 6]] {
        let message = refusal(model.forward(&tensor(&mut random, shape, 1.0)));
        assert!(message.contains("images") && message.contains("(batch, 3, 6, 4)"), "{message}");
    }
    let whole = Tensor::zeros((1, 3, 6, 4), DType::U8, &Device::Cpu).unwrap();
    assert!(refusal(model.forward(&whole)).contains("f32, f16 or bf16"));
    assert_eq!(model.forward(&Tensor::zeros((0, 3, 6, 4), DType::F32, &Device::Cpu).unwrap()).unwrap().dims(), [0, 5]);

    let build = |config: &VisionConfig| {
        VisionModel::new(config, VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu))
    };
    let bad = [
        (VisionConfig { patch: 0, ..good.clone() }, "`patch`"),
        (VisionConfig { stride: 0, ..good.clone() }, "`stride`"),
        (VisionConfig { channels: 0, ..good.clone() }, "`channels`"),
        (VisionConfig { classes: 0, ..good.clone() }, "`classes`"),
        (VisionConfig { image: [6, 1], ..good.clone() }, "at least one patch of 2 x 2"),
        (VisionConfig { image: [usize::MAX, usize::MAX], ..good.clone() }, "less than 2^32 pixels"),
        (VisionConfig { classes: usize::MAX, ..good.clone() }, "can be counted"),
        (VisionConfig { backbone: BackboneConfig::new(0, 12), ..good.clone() }, "n_layer"),
    ];
    for (config, message) in bad {
        let error = refusal(build(&config));
        assert!(error.contains(message), "{error}: should say {message}");
    }
}

/// Half a model computes what a whole one does, within the type's rounding: 2^-8 of each number of bf16, through some ten
/// operations in a row.
#[test]
fn half_types_compute_nearly_the_same() {
    let mut random = random();
    let config = config([6, 4], 2, 2, 1);
    let (model, _) = drawn(&config, &mut random);
    let tensors: HashMap<_, _> = model.named_tensors().into_iter().map(|(name, t)| (name, t.detach())).collect();
    let half = VisionModel::new(&config, VarBuilder::from_tensors(tensors, DType::BF16, &Device::Cpu)).unwrap();
    let images = tensor(&mut random, &[3, 1, 6, 4], 1.0);
    let logits = half.forward(&images).unwrap();
    assert_eq!(logits.dtype(), DType::F32);
    assert_close(&logits, &model.forward(&images).unwrap(), 10.0 / 256.0, "bf16");
}

/// A Transformer on patches: the token in their middle sees all of them, before it and after it, and every parameter learns.
#[test]
fn layers_of_attention_see_all_patches() {
    let mut random = random();
    let attention = AttentionConfig { causal: false, rope_theta: None, ..AttentionConfig::new(12, 3) };
    let config = VisionConfig {
        backbone: BackboneConfig {
            feed_forward: Some(MlpConfig::new(12, 10).into()),
            ..BackboneConfig::with_mixer(1, attention)
        },
        ..config([4, 6], 2, 2, 1)
    };
    let variables = VarMap::new();
    let build = || VisionModel::new(&config, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu)).unwrap();
    build();
    shake(&variables, &mut random);
    let model = build();
    let count: usize = model.named_tensors().iter().map(|(_, tensor)| tensor.elem_count()).sum();
    assert_eq!(config.parameter_count().unwrap(), count);
    let images = Var::from_tensor(&tensor(&mut random, &[2, 1, 4, 6], 1.0)).unwrap();
    let logits = model.forward(&images).unwrap();
    let gradients = logits.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    for (name, variable) in variables.data().lock().unwrap().iter() {
        assert!(gradients.get(variable).is_some(), "{name}");
    }
    // Of each of the two rows and three columns of patches.
    let slopes = values(gradients.get(&images).unwrap());
    for patch in 0..6 {
        let (top, left) = (patch / 3 * 2, patch % 3 * 2);
        let pixels = [(top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)];
        assert!(pixels.iter().all(|(row, column)| slopes[row * 6 + column] != 0.0), "patch {patch}");
    }
}
