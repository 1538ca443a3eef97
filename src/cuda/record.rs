//! Launches that are recorded rather than made, to be repeated one by one or as a CUDA graph.

use std::cell::RefCell;
use std::ffi::c_void;
use std::fmt;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use bytemuck::Pod;
use cudarc::driver::sys::{
    self, CUgraphExec, CUgraphInstantiate_flags, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchConfig, CUstream, CUstreamCaptureMode,
};
use cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, DriverError, result};

use super::launch::is_compiled_for;
use super::{Context, Kernel};
use crate::{Error, Result};

/// A launch: everything but its stream.
#[derive(Clone)]
pub(crate) struct Launch {
    function: CudaFunction,
    kernel: Kernel,
    grid: [u32; 2],
    threads: u32,
    shared: u32,
    /// The kernel's one argument, in words so that it is aligned.
    params: Box<[u64]>,
    start: Start,
}

/// When a launch begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// Once the launch before it has ended.
    After,
    /// It may begin before that.
    Overlapping,
    /// Once the launch before it has ended, all of its blocks together, which wait for each other.
    Together,
}

impl Launch {
    fn new<P: Pod>(
        function: CudaFunction,
        kernel: &Kernel,
        grid: [usize; 2],
        threads: usize,
        shared: usize,
        params: &P,
        start: Start,
    ) -> Self {
        let mut words = vec![0u64; size_of::<P>().div_ceil(size_of::<u64>())].into_boxed_slice();
        bytemuck::cast_slice_mut(&mut words)[..size_of::<P>()].copy_from_slice(bytemuck::bytes_of(params));
        Self {
            function,
            kernel: *kernel,
            grid: grid.map(|blocks| blocks as u32),
            threads: threads as u32,
            shared: shared as u32,
            params: words,
            start,
        }
    }

    /// A launch of blocks that wait for each other, of which the device must have room for all.
    ///
    /// # Safety
    /// `params` must be what the kernel takes.
    pub unsafe fn cooperative<P: Pod>(
        context: &Context,
        kernel: &Kernel,
        grid: [usize; 2],
        threads: usize,
        shared: usize,
        params: &P,
    ) -> Result<Self> {
        Ok(Self::new(context.function(kernel)?, kernel, grid, threads, shared, params, Start::Together))
    }

    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// The kernel's argument, if it is as large as that.
    pub fn params<P: Pod>(&self) -> Option<P> {
        let bytes = bytemuck::cast_slice(&self.params);
        (bytes.len() == size_of::<P>()).then(|| bytemuck::pod_read_unaligned(bytes))
    }

    /// Whether it may begin before the launch before it has ended: none writes what it reads early.
    pub fn overlaps(&self) -> bool {
        self.start == Start::Overlapping
    }

    /// # Safety
    /// What the argument points at must be there, and the stream one of the function's context, which is bound to this thread.
    unsafe fn enqueue(&self, stream: CUstream) -> Result<()> {
        let mut arguments = [self.params.as_ptr().cast_mut().cast::<c_void>()];
        let error = |error| Error::cuda(format_args!("launching {}", self.kernel), error);
        if self.start == Start::Together {
            let [columns, rows] = self.grid;
            // SAFETY: as below.
            let code = unsafe {
                let (function, arguments) = (self.function.cu_function(), arguments.as_mut_ptr());
                sys::cuLaunchCooperativeKernel(
                    function,
                    columns,
                    rows,
                    1,
                    self.threads,
                    1,
                    1,
                    self.shared,
                    stream,
                    arguments,
                )
            };
            return code.result().map_err(error);
        }
        let mut attribute = CUlaunchAttribute {
            id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: 1,
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream,
            attrs: &raw mut attribute,
            numAttrs: self.overlaps().into(),
        };
        // SAFETY: the function is loaded as long as the handle is kept, and takes one argument of this size, which the driver copies,
        // as it does the configuration; what the argument points at is there, as the caller promises.
        let code = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.function.cu_function(),
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        code.result().map_err(error)
    }
}

/// Numbers that recorded launches read or write, in memory of their own.
#[derive(Clone)]
pub(crate) struct Table(Arc<Numbers>);

struct Numbers(CudaSlice<u64>);

impl Drop for Numbers {
    fn drop(&mut self) {
        // Launches on other streams, which the one that frees it does not wait for, may not be done. There is nobody to tell of an error.
        let _ = self.0.context().synchronize();
    }
}

impl Table {
    pub fn address(&self) -> u64 {
        let Numbers(slice) = &*self.0;
        slice.device_ptr(slice.stream()).0
    }
}

/// What a thread records.
#[derive(Default)]
struct Recorded {
    launches: Vec<Launch>,
    /// Where calls so far write.
    written: Vec<Range<u64>>,
    /// How many of these are of the calls before this one.
    written_before: usize,
}

thread_local! {
    /// What this thread records, if it does.
    static RECORDED: RefCell<Option<Recorded>> = const { RefCell::new(None) };
}

/// Whether this thread records.
pub(super) fn is_recording() -> bool {
    RECORDED.with_borrow(Option::is_some)
}

/// Begins a call, if this thread records it.
pub(super) fn begin_call() {
    RECORDED.with_borrow_mut(|recorded| {
        if let Some(recorded) = recorded {
            recorded.written_before = recorded.written.len();
        }
    });
}

/// Notes where a call that this thread records writes.
pub(super) fn note_written(addresses: Range<u64>) {
    RECORDED.with_borrow_mut(|recorded| {
        if let Some(recorded) = recorded
            && !recorded.written.contains(&addresses)
        {
            recorded.written.push(addresses);
        }
    });
}

/// The first compute capability, as the driver numbers them, for which kernels wait by themselves.
const OVERLAPPING: i32 = 90;

/// Adds a launch to what this thread records; false if it does not. `early`: what the kernel reads before it waits for those before
/// it, if it does wait; what its own call writes there, it waits for by itself.
pub(super) fn record_launch<P: Pod>(
    function: &CudaFunction,
    kernel: &Kernel,
    grid: [usize; 2],
    threads: usize,
    shared: usize,
    params: &P,
    early: Option<&[Range<u64>]>,
) -> Result<bool> {
    RECORDED.with_borrow_mut(|recorded| {
        let Some(recorded) = recorded else { return Ok(false) };
        // The first one follows what the recording does not know.
        let is_first = recorded.launches.is_empty();
        let is_written = |early: &Range<u64>| {
            let before = &recorded.written[..recorded.written_before];
            before.iter().any(|written| written.start < early.end && early.start < written.end)
        };
        // Of what was compiled for older devices no kernel waits.
        let overlaps = early.is_some_and(|early| !is_first && !early.iter().any(is_written))
            && is_compiled_for(function, kernel, OVERLAPPING)?;
        let start = if overlaps { Start::Overlapping } else { Start::After };
        recorded.launches.push(Launch::new(function.clone(), kernel, grid, threads, shared, params, start));
        Ok(true)
    })
}

/// Calls `work`, and records what the operators of this crate that it calls on this thread would launch, rather than launching it.
///
/// The operators check their arguments as ever and note where these lie. What is recorded can be repeated as often as is wanted,
/// by itself ([`Recording::launch`]) or as a graph ([`Recording::graph`]), always on the same memory: inputs are written there
/// between two times, and slots may lie on the device. Work of other crates is no part of it, and is done at once.
///
/// # Errors
/// Those of `work`. An operator that needs more than its arguments: workspaces of its own, tables of packed sequences or of more than
/// 512 slots on the host.
///
/// ```no_run
/// use selective_scan::{View, ViewMut, cuda, norm};
///
/// # fn main() -> selective_scan::Result<()> {
/// let context = cuda::context(0)?;
/// let stream = context.default_stream();
/// let (x, mut out) = (stream.clone_htod(&[3.0f32, 4.0])?, stream.alloc_zeros::<f32>(2)?);
/// let recording = cuda::record(&context, || {
///     let inputs = norm::Inputs::<_, f32, _>::new(View::on_device(&x, [1, 2]));
///     norm::cuda::forward(&stream, &inputs, norm::OutputMut { out: &mut out, residual_out: None })
/// })?;
/// let graph = recording.graph()?;
/// // SAFETY: what it reads and writes lives as long, and nothing else uses it meanwhile.
/// unsafe { graph.launch(&stream)? };
/// # Ok(())
/// # }
/// ```
pub fn record<E: From<Error>>(
    context: &Arc<CudaContext>,
    work: impl FnOnce() -> Result<(), E>,
) -> Result<Recording, E> {
    /// Ends the recording however `work` ends.
    struct End;
    impl Drop for End {
        fn drop(&mut self) {
            RECORDED.with_borrow_mut(|recorded| *recorded = None);
        }
    }
    if is_recording() {
        let action = "recording launches".into();
        return Err(Error::Cuda { action, message: "this thread is recording already".into() }.into());
    }
    RECORDED.with_borrow_mut(|recorded| *recorded = Some(Recorded::default()));
    let end = End;
    work()?;
    let recorded = RECORDED.with_borrow_mut(Option::take).unwrap_or_default();
    drop(end);
    Ok(Recording { context: context.clone(), launches: recorded.launches, tables: Vec::new() })
}

/// Launches that [`record`] has recorded, in their order.
#[derive(Clone)]
pub struct Recording {
    context: Arc<CudaContext>,
    launches: Vec<Launch>,
    /// What launches read that is no argument.
    tables: Vec<Table>,
}

impl fmt::Debug for Recording {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_list().entries(self.launches.iter().map(|launch| (launch.kernel.to_string(), launch.grid))).finish()
    }
}

impl Recording {
    /// The number of launches.
    pub fn len(&self) -> usize {
        self.launches.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.launches.is_empty()
    }

    pub(crate) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub(crate) fn launches(&self) -> &[Launch] {
        &self.launches
    }

    /// Copies numbers to the device, for launches that take the place of some.
    pub(crate) fn upload(&self, numbers: &[u64]) -> Result<Table> {
        let error = |error| Error::cuda(format_args!("uploading {} numbers for a recording", numbers.len()), error);
        self.bind("uploading numbers for a recording")?;
        let stream = self.context.default_stream();
        let table = stream.clone_htod(numbers).map_err(error)?;
        // Launches of other streams do not wait for this one.
        stream.synchronize().map_err(error)?;
        Ok(Table(Arc::new(Numbers(table))))
    }

    /// Other launches in place of these, which read these tables too.
    pub(crate) fn with(self, launches: Vec<Launch>, tables: Vec<Table>) -> Self {
        Self { launches, tables: [self.tables, tables].concat(), ..self }
    }

    /// Enqueues them one after another.
    ///
    /// # Safety
    /// All that was an argument when they were recorded must still be there, and nothing else may use what they write, nor write
    /// what they read, until they are done.
    pub unsafe fn launch(&self, stream: &Arc<CudaStream>) -> Result<()> {
        self.check(stream)?;
        // SAFETY: the stream lives as long as its reference; the rest is the caller's promise.
        unsafe { self.enqueue(stream.cu_stream()) }
    }

    fn check(&self, stream: &Arc<CudaStream>) -> Result<()> {
        check_context(&self.context, stream)?;
        self.bind("launching what was recorded")
    }

    fn bind(&self, action: &str) -> Result<()> {
        self.context.bind_to_thread().map_err(|error| Error::cuda(action, error))
    }

    /// # Safety
    /// As [`launch`](Self::launch), on a stream of the context, which is bound to this thread.
    unsafe fn enqueue(&self, stream: CUstream) -> Result<()> {
        // SAFETY: as the caller promises.
        self.launches.iter().try_for_each(|launch| unsafe { launch.enqueue(stream) })
    }

    /// Makes a graph of them, which the driver launches as one.
    ///
    /// # Errors
    /// What the driver refuses, such as a capture on one without graphs.
    pub fn graph(&self) -> Result<Graph> {
        let error = |error: DriverError| Error::cuda("making a graph", error);
        self.bind("making a graph")?;
        // A stream of its own, which cudarc does not know: it would take the program for one of several streams from then on.
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(error)?;
        // SAFETY: the stream is this call's own. The capture runs nothing: what the launches point at is looked at when the graph
        // is launched, whose caller promises that it is there.
        let captured = unsafe {
            result::stream::begin_capture(stream, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
                .map_err(error)
                .and_then(|()| {
                    let enqueued = self.enqueue(stream);
                    // Ended in any case, or the stream could not be given back.
                    let graph = result::stream::end_capture(stream).map_err(error);
                    enqueued.and(graph)
                })
        };
        // SAFETY: nothing else uses the stream, nor after this the graph, which the executable one does not need.
        let made = captured.and_then(|graph| unsafe {
            let made = result::graph::instantiate(graph, CUgraphInstantiate_flags(0)).map_err(error);
            let destroyed = result::graph::destroy(graph).map_err(error);
            made.and_then(|made| destroyed.map(|()| made))
        });
        // SAFETY: as above.
        let given_back = unsafe { result::stream::destroy(stream) }.map_err(error);
        let graph = Graph { context: self.context.clone(), graph: made?, _tables: self.tables.clone() };
        given_back.map(|()| graph)
    }
}

fn check_context(context: &Arc<CudaContext>, stream: &Arc<CudaStream>) -> Result<()> {
    if ptr::eq(Arc::as_ptr(context), Arc::as_ptr(stream.context())) {
        return Ok(());
    }
    Err(Error::argument("stream", format_args!("a stream of GPU {}", context.ordinal()), "one of another context"))
}

/// A CUDA graph of recorded launches.
pub struct Graph {
    context: Arc<CudaContext>,
    graph: CUgraphExec,
    /// What its launches read.
    _tables: Vec<Table>,
}

// SAFETY: the driver's handle may be used from any thread, and is not changed after it was made.
unsafe impl Send for Graph {}
// SAFETY: as above; launches from several threads are the callers' promise to keep apart.
unsafe impl Sync for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.debug_struct("Graph").field("device", &self.context.ordinal()).finish_non_exhaustive()
    }
}

impl Graph {
    /// Enqueues the graph. Two launches of one graph run one after the other, whatever their streams.
    ///
    /// # Safety
    /// As [`Recording::launch`].
    pub unsafe fn launch(&self, stream: &Arc<CudaStream>) -> Result<()> {
        check_context(&self.context, stream)?;
        let error = |error| Error::cuda("launching a graph", error);
        self.context.bind_to_thread().map_err(error)?;
        // SAFETY: both handles live as long as their references; the rest is the caller's promise.
        unsafe { result::graph::launch(self.graph, stream.cu_stream()) }.map_err(error)
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // There is nobody to tell of an error, and nothing to do about it. A graph that still runs is given back once it has.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the handle is this value's own, and is not used again.
            let _ = unsafe { result::graph::exec_destroy(self.graph) };
        }
    }
}

#[cfg(test)]
mod tests {
    use cudarc::driver::CudaSlice;

    use super::*;
    use crate::cuda::stream_or_skip as stream;
    use crate::decode::{self, ConvStep, Linear, LinearMut};
    use crate::{Slots, View, ViewMut};

    fn product(
        stream: &Arc<CudaStream>,
        x: &CudaSlice<f32>,
        matrix: &CudaSlice<f32>,
        rows: usize,
        out: &mut CudaSlice<f32>,
    ) -> Result<()> {
        let inputs = Linear::new(View::on_device(x, [1, 64]), View::on_device(matrix, [rows, 64]));
        decode::cuda::linear(stream, &inputs, LinearMut::<_, f32, _>::new(out))
    }

    /// A product begins before the launch before it has ended, but not the first, nor one whose matrix is what another has written.
    #[test]
    fn what_is_read_early_is_written_by_none() {
        let Some(stream) = stream() else { return };
        let zeros = |len| stream.alloc_zeros::<f32>(len).unwrap();
        let (x, matrix, mut first, mut second, mut third) = (zeros(64), zeros(64 * 64), zeros(64), zeros(64), zeros(1));
        let recording = record::<Error>(stream.context(), || {
            product(&stream, &x, &matrix, 64, &mut first)?;
            product(&stream, &first, &matrix, 64, &mut second)?;
            product(&stream, &x, &second, 1, &mut third)
        });
        let overlaps: Vec<_> = recording.unwrap().launches.iter().map(Launch::overlaps).collect();
        assert_eq!(overlaps, [false, true, false]);
    }

    /// The state that a product's convolution brings up to date it may read early, unless a call before it has written that.
    #[test]
    fn a_call_may_read_early_what_only_it_writes() {
        let Some(stream) = stream() else { return };
        let zeros = |len| stream.alloc_zeros::<f32>(len).unwrap();
        let (x, matrix, filter, mut out, mut state) = (zeros(64), zeros(64 * 64), zeros(64 * 2), zeros(64), zeros(64));
        let recording = record::<Error>(stream.context(), || {
            product(&stream, &x, &matrix, 64, &mut out)?;
            for _ in 0..2 {
                let step = ConvStep { weight: View::on_device(&filter, [64, 2]), bias: None, slots: Slots::Rows };
                let product = Linear::new(View::on_device(&x, [1, 64]), View::on_device(&matrix, [64, 64]));
                let conv_state = Some(ViewMut::on_device(&mut state, [1, 1, 64]));
                let outputs = LinearMut { conv_state, ..LinearMut::new(&mut out) };
                decode::cuda::linear(&stream, &Linear { conv: Some(step), ..product }, outputs)?;
            }
            Ok(())
        });
        let overlaps: Vec<_> = recording.unwrap().launches.iter().map(Launch::overlaps).collect();
        assert_eq!(overlaps, [false, true, false]);
    }
}
