//! The README's examples are compiled with the documentation's, but for the one that needs the feature `cuda`.

/// The first example in Rust after `heading`.
fn example<'t>(text: &'t str, heading: &str, fence: &str) -> &'t str {
    let after = text.split_once(heading).expect("the heading").1;
    let block = after.split_once(fence).expect("an example").1;
    block.split_once("```").expect("its end").0
}

/// That one is the example of the module `cuda`, which is compiled where its feature is on.
#[test]
fn has_the_example_of_the_module_cuda() {
    let readme = example(include_str!("../../README.md"), "## On a GPU", "```rust,ignore\n");
    let module = include_str!("../../src/cuda/mod.rs").lines().filter_map(|line| line.strip_prefix("//!"));
    let module: String = module.map(|line| format!("{}\n", line.strip_prefix(' ').unwrap_or(line))).collect();
    assert_eq!(readme, example(&module, "", "```no_run\n"));
}
