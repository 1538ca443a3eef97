//! Packed sequences get what they get alone.

use candle_core::{DType, Tensor};
use selective_scan::nn::MambaConfig;

use super::{
    SAME, SAME_GRADIENTS, all_blocks, assert_close, block, causal_blocks, cuts, ids, mamba_states, model, random,
    tensor,
};

#[test]
fn a_block_and_its_gradients() {
    let mut random = random();
    for (name, config) in all_blocks() {
        let (block, variables) = block(&config, &mut random);
        let x = candle_core::Var::from_tensor(&tensor(&mut random, &[1, 40, 12], 1.0)).unwrap();
        let d_out = tensor(&mut random, &[1, 40, 12], 1.0);
        let cu_seqlens = cuts(&mut random, 40);
        let packed = block.forward_packed(&x, &cu_seqlens).unwrap();
        let alone: Vec<_> = cu_seqlens
            .windows(2)
            .map(|ends| block.forward(&x.narrow(1, ends[0], ends[1] - ends[0]).unwrap()).unwrap())
            .collect();
        let alone = Tensor::cat(&alone, 1).unwrap();
        assert_close(&packed, &alone, SAME, name);

        let gradients = |out: &Tensor| (out * &d_out).unwrap().sum_all().unwrap().backward().unwrap();
        let (packed, alone) = (gradients(&packed), gradients(&alone));
        assert_close(packed.get(&x).unwrap(), alone.get(&x).unwrap(), SAME_GRADIENTS, name);
        for (parameter, variable) in variables.data().lock().unwrap().iter() {
            let what = format!("{name}, {parameter}");
            assert_close(packed.get(variable).unwrap(), alone.get(variable).unwrap(), SAME_GRADIENTS, &what);
        }
    }
}

#[test]
fn a_model() {
    let mut random = random();
    for (name, config) in all_blocks() {
        let (model, _) = model(&config, &mut random);
        let (ids, cu_seqlens) = (ids(&mut random, 1, 30), cuts(&mut random, 30));
        let packed = model.forward_packed(&ids, &cu_seqlens).unwrap();
        for ends in cu_seqlens.windows(2) {
            let (start, length) = (ends[0], ends[1] - ends[0]);
            let alone = model.forward(&ids.narrow(1, start, length).unwrap()).unwrap();
            assert_close(&packed.narrow(1, start, length).unwrap(), &alone, SAME, name);
        }
    }
}

/// Prompts of several lengths in one prefill leave the states that each leaves alone.
#[test]
fn prompts() {
    let mut random = random();
    for (name, config) in causal_blocks() {
        let (model, _) = model(&config, &mut random);
        let (ids, cu_seqlens) = (ids(&mut random, 1, 30), cuts(&mut random, 30));
        let count = cu_seqlens.len() - 1;
        let (together, apart) =
            (model.new_cache(count + 1, DType::F32).unwrap(), model.new_cache(1, DType::F32).unwrap());
        // Prompt i in slot i + 1.
        let slots: Vec<_> = (1..=count as i32).collect();
        // Twice, so that the second time goes on from what the first left.
        for _ in 0..2 {
            let logits = model.prefill_packed(&ids, &cu_seqlens, &together, &slots).unwrap();
            assert_eq!(logits.dims(), [count, 11]);
        }
        let logits = model.prefill_packed(&ids, &cu_seqlens, &together, &slots).unwrap();
        for (index, ends) in cu_seqlens.windows(2).enumerate() {
            let prompt = ids.narrow(1, ends[0], ends[1] - ends[0]).unwrap();
            apart.reset(None).unwrap();
            let mut alone = model.prefill(&prompt, &apart, None).unwrap();
            for _ in 0..2 {
                alone = model.prefill(&prompt, &apart, None).unwrap();
            }
            assert_close(&logits.narrow(0, index, 1).unwrap(), &alone, SAME, name);
            for (together, apart) in mamba_states(&together).into_iter().zip(mamba_states(&apart)) {
                assert_close(&together.ssm.narrow(0, index + 1, 1).unwrap(), &apart.ssm, SAME, name);
                assert_close(&together.conv.narrow(0, index + 1, 1).unwrap(), &apart.conv, SAME, name);
            }
        }
    }
}

#[test]
fn rows_of_a_batch_are_strangers() {
    let mut random = random();
    let config: MambaConfig = all_blocks().swap_remove(5).1;
    let (block, _) = block(&config, &mut random);
    let x = tensor(&mut random, &[3, 17, 12], 1.0);
    let whole = block.forward(&x).unwrap();
    for row in 0..3 {
        let alone = block.forward(&x.narrow(0, row, 1).unwrap()).unwrap();
        assert_close(&whole.narrow(0, row, 1).unwrap(), &alone, SAME, "row");
    }
}
