//! What concerns GPUs and no operator.

use selective_scan::cuda;

/// A context that does not exist is an error, not a panic.
#[test]
fn no_such_device() {
    let error = cuda::context(usize::from(u8::MAX)).expect_err("there are not that many").to_string();
    assert!(error.starts_with("opening GPU 255") || error.starts_with("loading the CUDA driver"), "{error}");
}
