//! Matrix products of views, written into views.

use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp3, Layout, Result, Tensor};
use half::{bf16, f16};

use crate::Error;

/// Computes `out = a·b`, or `out += a·b` with `accumulate`, in place: `(m, k)` times `(k, n)` to `(m, n)`.
///
/// Where candle's `matmul` wants dense operands and gives a tensor of its own, these are views: a column range or a
/// transposed matrix is read, and a column range of `out` is written, where it lies. `a` and `b` have one type, `f32`, `f16`
/// or `bf16`; `out` has theirs or `f32`, which gets the sums of products of half numbers without rounding. Sums are taken in
/// `f32` (on GPUs by cuBLAS; of `f32` in TF32 if candle's `set_gemm_reduced_precision_f32` says so). Nothing is recorded for
/// a backward pass.
///
/// On GPUs an operand must have one dimension of stride 1, and `out` its last; an operand that has none is copied.
///
/// # Errors
/// An argument that does not fit, which the message names. `out` that is part of candle's graph, or that shares its storage
/// with `a` or `b`. What the device refuses.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use selective_scan::candle::gemm;
///
/// // Two products side by side in one matrix, with the transposes of weights as they are stored.
/// let (device, x) = (Device::Cpu, Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?);
/// let weight = Tensor::new(&[[1f32, 0.0], [0.0, 10.0], [5.0, 5.0]], &device)?;
/// let both = Tensor::zeros((2, 4), DType::F32, &device)?;
/// gemm(&both.narrow(1, 0, 3)?, &x, &weight.t()?, false)?;
/// gemm(&both.narrow(1, 3, 1)?, &x, &x.narrow(1, 0, 1)?, false)?;
/// assert_eq!(both.to_vec2::<f32>()?, [[1.0, 20.0, 15.0, 7.0], [3.0, 40.0, 35.0, 15.0]]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn gemm(out: &Tensor, a: &Tensor, b: &Tensor, accumulate: bool) -> Result<()> {
    let [m, k] = matrix("a", "(m, k)", a)?;
    let [b_rows, n] = matrix("b", "(k, n)", b)?;
    let dims = matrix("out", "(m, n)", out)?;
    let dtype = a.dtype();
    if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(super::device::unsupported("a", dtype).into());
    }
    let expected = |tensor: &Tensor| format!("{:?}", tensor.dims());
    if b_rows != k {
        return Err(Error::argument("b", format_args!("{k} rows, as `a` has columns"), expected(b)).into());
    }
    if dims != [m, n] {
        return Err(Error::argument("out", format_args!("shape {:?}", [m, n]), expected(out)).into());
    }
    if b.dtype() != dtype {
        return Err(
            Error::argument("b", format_args!("dtype {dtype:?}, as `a`"), format_args!("{:?}", b.dtype())).into()
        );
    }
    if out.dtype() != dtype && out.dtype() != DType::F32 {
        let got = format_args!("{:?}", out.dtype());
        return Err(Error::argument("out", format_args!("dtype {dtype:?}, as `a`, or F32"), got).into());
    }
    if out.track_op() {
        return Err(
            Error::argument("out", "a tensor outside of candle's graph, since it is overwritten", "one in it").into()
        );
    }
    if out.stride()[1] != 1 && n > 1 {
        let got = format_args!("strides {:?}", out.stride());
        return Err(Error::argument("out", "columns of stride 1", got).into());
    }
    if m == 0 || n == 0 {
        return Ok(());
    }
    if k == 0 {
        return if accumulate { Ok(()) } else { out.zero_set() };
    }
    out.inplace_op3(&readable(a)?, &readable(b)?, &Gemm { accumulate })
}

fn matrix(name: &'static str, dims: &str, tensor: &Tensor) -> Result<[usize; 2]> {
    let rank = || Error::argument(name, format_args!("shape {dims}"), format_args!("{:?}", tensor.dims()));
    Ok(tensor.dims().try_into().map_err(|_| rank())?)
}

/// The operand, or a dense copy of one that no product on this device reads.
fn readable(operand: &Tensor) -> Result<Tensor> {
    let [rows, columns] = [operand.stride()[0], operand.stride()[1]];
    // A view that repeats elements is none of a matrix to cuBLAS.
    let is_matrix = columns == 1 && rows >= operand.dims()[1] || rows == 1 && columns >= operand.dims()[0];
    let is_read = match operand.device().is_cpu() {
        true => operand.dtype() == DType::F32,
        false => {
            is_matrix
                && [rows, columns, operand.dims()[0], operand.dims()[1]].iter().all(|&size| i32::try_from(size).is_ok())
        }
    };
    if is_read { Ok(operand.detach()) } else { operand.detach().contiguous() }
}

struct Gemm {
    accumulate: bool,
}

impl Gemm {
    /// The product of matrices of `f32` on the processor.
    fn multiply(&self, out: &mut [f32], out_layout: &Layout, a: (&[f32], &Layout), b: (&[f32], &Layout)) {
        let (m, n, k) = (out_layout.dims()[0], out_layout.dims()[1], a.1.dims()[1]);
        // A row of one column may have any stride.
        let stride = |layout: &Layout, i: usize| layout.stride()[i] as isize;
        let at = |layout: &Layout| layout.start_offset();
        let threads = candle_core::utils::get_num_threads();
        let parallelism = if threads > 1 { gemm::Parallelism::Rayon(threads) } else { gemm::Parallelism::None };
        // SAFETY: candle's layouts lie within their storages, and the output's, whose elements have a place each, in none of
        // the others.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr().add(at(out_layout)),
                stride(out_layout, 1),
                stride(out_layout, 0),
                self.accumulate,
                a.0.as_ptr().add(at(a.1)),
                stride(a.1, 1),
                stride(a.1, 0),
                b.0.as_ptr().add(at(b.1)),
                stride(b.1, 1),
                stride(b.1, 0),
                1.0,
                1.0,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}

impl InplaceOp3 for Gemm {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn cpu_fwd(
        &self,
        out: &mut CpuStorage,
        out_layout: &Layout,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<()> {
        if let (CpuStorage::F32(out), CpuStorage::F32(a), CpuStorage::F32(b)) = (&mut *out, a, b) {
            self.multiply(out, out_layout, (a, a_layout), (b, b_layout));
            return Ok(());
        }
        // Products of half numbers are those of the same numbers in f32.
        let (a, a_layout) = widened(a, a_layout)?;
        let (b, b_layout) = widened(b, b_layout)?;
        if let CpuStorage::F32(out) = out {
            self.multiply(out, out_layout, (&a, &a_layout), (&b, &b_layout));
            return Ok(());
        }
        let wide_layout = Layout::contiguous(out_layout.shape());
        let mut wide = vec![0.0; wide_layout.shape().elem_count()];
        Self { accumulate: false }.multiply(&mut wide, &wide_layout, (&a, &a_layout), (&b, &b_layout));
        let [rows, columns] = [out_layout.stride()[0], wide_layout.dims()[1]];
        let starts = (0..wide_layout.dims()[0]).map(|row| out_layout.start_offset() + row * rows);
        let places = starts.flat_map(|start| start..start + columns);
        match out {
            CpuStorage::F16(out) => {
                for (to, sum) in places.zip(&wide) {
                    out[to] = f16::from_f32(if self.accumulate { out[to].to_f32() + sum } else { *sum });
                }
            }
            CpuStorage::BF16(out) => {
                for (to, sum) in places.zip(&wide) {
                    out[to] = bf16::from_f32(if self.accumulate { out[to].to_f32() + sum } else { *sum });
                }
            }
            _ => return Err(Error::argument("out", "dtype F32, F16 or BF16", "another").into()),
        }
        Ok(())
    }

    #[cfg(feature = "candle-cuda")]
    fn cuda_fwd(
        &self,
        out: &mut CudaStorage,
        out_layout: &Layout,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<()> {
        cublas::gemm((out, out_layout), (a, a_layout), (b, b_layout), self.accumulate)
    }

    #[cfg(not(feature = "candle-cuda"))]
    fn cuda_fwd(
        &self,
        _: &mut CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<()> {
        Err(super::device::elsewhere("out", "an NVIDIA GPU").into())
    }
}

/// The elements of a view of half numbers as `f32`, dense.
fn widened(storage: &CpuStorage, layout: &Layout) -> Result<(Vec<f32>, Layout)> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(candle_core::Error::RequiresContiguous { op: "gemm" }.bt());
    };
    let dense = match storage {
        CpuStorage::F32(data) => data[start..end].to_vec(),
        CpuStorage::F16(data) => data[start..end].iter().map(|x| x.to_f32()).collect(),
        CpuStorage::BF16(data) => data[start..end].iter().map(|x| x.to_f32()).collect(),
        _ => return Err(Error::argument("a", "dtype F32, F16 or BF16", "another").into()),
    };
    Ok((dense, Layout::contiguous(layout.shape())))
}

#[cfg(feature = "candle-cuda")]
mod cublas {
    use std::ffi::c_void;

    use candle_core::backend::BackendStorage;
    use candle_core::cuda_backend::gemm_reduced_precision_f32;
    use candle_core::{CudaStorage, DType, Layout, Result};
    use cudarc::cublas::{result, sys};
    use cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
    use half::{bf16, f16};

    use crate::Error;

    /// A matrix as cuBLAS reads it, which takes columns for what candle calls rows.
    struct Operand {
        operation: sys::cublasOperation_t,
        /// Elements from one column (of cuBLAS's) to the next.
        leading: i32,
    }

    impl Operand {
        fn new(layout: &Layout) -> Result<Self> {
            use sys::cublasOperation_t::{CUBLAS_OP_N, CUBLAS_OP_T};
            let [rows, columns] = [layout.dims()[0], layout.dims()[1]];
            let [row, column] = [layout.stride()[0], layout.stride()[1]];
            // Where a dimension has one element its stride means nothing, and cuBLAS wants it to be large enough.
            if column == 1 && (row >= columns || rows == 1) {
                Ok(Self { operation: CUBLAS_OP_N, leading: int("a row", row.max(columns))? })
            } else {
                Ok(Self { operation: CUBLAS_OP_T, leading: int("a column", column.max(rows))? })
            }
        }
    }

    /// A size as cuBLAS takes it.
    fn int(what: &str, size: usize) -> Result<i32> {
        let limit = || Error::argument("a", format_args!("{what} of at most {} elements", i32::MAX), size);
        Ok(i32::try_from(size).map_err(|_| limit())?)
    }

    fn data_type(dtype: DType) -> sys::cudaDataType {
        match dtype {
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
            DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
            _ => sys::cudaDataType::CUDA_R_32F,
        }
    }

    fn read<'a>(
        storage: &'a CudaStorage,
        layout: &Layout,
        stream: &'a CudaStream,
    ) -> Result<(*const c_void, SyncOnDrop<'a>)> {
        let (address, guard) = match storage.dtype() {
            DType::F16 => storage.as_cuda_slice::<f16>()?.device_ptr(stream),
            DType::BF16 => storage.as_cuda_slice::<bf16>()?.device_ptr(stream),
            _ => storage.as_cuda_slice::<f32>()?.device_ptr(stream),
        };
        Ok((offset(address, layout, storage.dtype()) as *const c_void, guard))
    }

    fn offset(address: u64, layout: &Layout, dtype: DType) -> u64 {
        address + (layout.start_offset() * dtype.size_in_bytes()) as u64
    }

    pub fn gemm(
        (out, out_layout): (&mut CudaStorage, &Layout),
        (a, a_layout): (&CudaStorage, &Layout),
        (b, b_layout): (&CudaStorage, &Layout),
        accumulate: bool,
    ) -> Result<()> {
        let device = out.device().clone();
        let (stream, blas) = (device.cuda_stream(), device.cublas_handle());
        let (dtype, out_dtype) = (a.dtype(), out.dtype());
        let compute = match dtype {
            DType::F32 if gemm_reduced_precision_f32() => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let [m, n] = [int("rows", out_layout.dims()[0])?, int("columns", out_layout.dims()[1])?];
        let k = int("columns", a_layout.dims()[1])?;
        let (a_operand, b_operand) = (Operand::new(a_layout)?, Operand::new(b_layout)?);
        let leading = int("a row", out_layout.stride()[0].max(out_layout.dims()[1]))?;
        let (a_data, _a) = read(a, a_layout, &stream)?;
        let (b_data, _b) = read(b, b_layout, &stream)?;
        let (address, _out) = match out_dtype {
            DType::F16 => out.as_cuda_slice_mut::<f16>()?.device_ptr_mut(&stream),
            DType::BF16 => out.as_cuda_slice_mut::<bf16>()?.device_ptr_mut(&stream),
            _ => out.as_cuda_slice_mut::<f32>()?.device_ptr_mut(&stream),
        };
        let (alpha, beta) = (1f32, if accumulate { 1f32 } else { 0.0 });
        // SAFETY: candle's layouts lie within their storages; the matrices are those of the layouts, transposed, as rows are
        // cuBLAS's columns; and the output, which candle has locked for writing, is in none of the other storages.
        unsafe {
            result::gemm_ex(
                *blas.handle(),
                b_operand.operation,
                a_operand.operation,
                n,
                m,
                k,
                (&raw const alpha).cast(),
                b_data,
                data_type(dtype),
                b_operand.leading,
                a_data,
                data_type(dtype),
                a_operand.leading,
                (&raw const beta).cast(),
                offset(address, out_layout, out_dtype) as *mut c_void,
                data_type(out_dtype),
                leading,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
            )
        }
        .map_err(|error| candle_core::Error::Cuda(Box::new(error)))
    }
}
