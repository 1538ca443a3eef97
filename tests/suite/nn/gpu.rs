//! Tests of models on a GPU, or on a simulated one. Without one they say that they are skipped.

use super::{decoder, hybrids, loss, nodes, serving};
use crate::candle::gpu::on_the_device;

on_the_device! {
    decoding_steps_are_the_models: |device| decoder::steps_are_the_models(device);
    company_changes_no_bit: |device| decoder::company_changes_no_bit(device);
    graphs_are_launches: |device| decoder::graphs_are_launches(device);
    texts_are_those_of_sequences_alone: |device| {
        let [requests, slots] = serving_load();
        serving::texts_are_those_of_sequences_alone(device, requests, slots, 2 * slots);
    };
    slots_hold_what_was_read: |device| serving::slots_hold_what_was_read(device, 30);
    hybrids_are_read_in_any_way: |device| hybrids::is_read_in_any_way(device, &mut super::random());
    a_block_is_its_operators: |device| nodes::a_block_is_its_operators(device);
    subsets_of_parameters: |device| nodes::subsets_of_parameters(device);
    layers_are_their_operators: |device| nodes::layers_are_their_operators(device);
    losses_in_chunks: |device| {
        loss::agrees_with_plain_operators(device);
        loss::agrees_with_the_reference(device);
        loss::half_types(device);
    };
    losses_of_models: |device| loss::models_lose_what_their_logits_do(device);
    without_gradients_the_same: |device| nodes::without_gradients_the_same(device);
    gradients_without_the_graph: |device| nodes::gradients_without_the_graph(device);
    losses_of_training: |device| nodes::losses_of_training(device);
}

/// How many requests a GPU is given, and how many slots: few, as a simulated one takes its time, or what `SERVING` says.
fn serving_load() -> [usize; 2] {
    let Ok(text) = std::env::var("SERVING") else { return [12, 5] };
    let numbers: Vec<usize> = text.split(',').map(|number| number.parse().expect("SERVING=requests,slots")).collect();
    numbers.try_into().expect("SERVING=requests,slots")
}
