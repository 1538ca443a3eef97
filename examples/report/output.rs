//! The results as rows, as a table and as JSON.

use std::fmt;

use comfy_table::{Cell, CellAlignment, Table, presets};
use rayon::ThreadPool;
use selective_scan::DType;
use serde::Serialize;

use crate::measure::Measured;

/// One operator at one shape on a number of threads.
#[derive(Debug, Serialize)]
pub struct Row {
    pub op: &'static str,
    pub direction: &'static str,
    pub device: &'static str,
    pub dtype: &'static str,
    pub threads: usize,
    pub b: usize,
    pub l: usize,
    pub d: usize,
    pub n: usize,
    pub seconds: f64,
    pub ns_per_state_step: f64,
    pub relative_error: f64,
    /// The time of the unfused scan, where it ran.
    pub unfused_seconds: Option<f64>,
    #[serde(skip)]
    pub within: bool,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, direction, dtype, threads, b, l, d, n, relative_error, .. } = self;
        write!(
            f,
            "{op} {direction} {dtype}, B {b}, L {l}, D {d}, N {n}, threads {threads}: relative error {relative_error:.1e}"
        )
    }
}

/// What was run.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    op: &'static str,
    device: &'static str,
    dtype: DType,
    threads: usize,
    shape: [usize; 4],
}

impl Case {
    /// The operator at `shape`, B, L, D and N.
    pub fn on(pool: &ThreadPool, op: &'static str, dtype: DType, shape: [usize; 4]) -> Self {
        Self { op, device: "cpu", dtype, threads: pool.current_num_threads(), shape }
    }

    /// The same on a GPU, which one thread feeds.
    #[cfg(feature = "cuda")]
    pub fn on_gpu(op: &'static str, dtype: DType, shape: [usize; 4]) -> Self {
        Self { op, device: "cuda", dtype, threads: 1, shape }
    }
}

/// All results, and what there is to say about those that are missing.
#[derive(Debug, Default)]
pub struct Rows {
    pub rows: Vec<Row>,
    pub notes: Vec<String>,
}

impl Rows {
    pub fn push(&mut self, case: Case, direction: &'static str, measured: Measured, unfused_seconds: Option<f64>) {
        let [b, l, d, n] = case.shape;
        self.rows.push(Row {
            op: case.op,
            direction,
            device: case.device,
            dtype: name(case.dtype),
            threads: case.threads,
            b,
            l,
            d,
            n,
            seconds: measured.seconds,
            ns_per_state_step: measured.seconds * 1e9 / (b * l * d * n) as f64,
            relative_error: measured.check.error,
            unfused_seconds,
            within: measured.check.within,
        });
    }

    /// The rows that are less accurate than they should be.
    pub fn failures(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(|row| !row.within)
    }

    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(&self.rows)
    }

    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN).set_header([
            "operator",
            "dtype",
            "threads",
            "B",
            "L",
            "D",
            "N",
            "time",
            "ns/state step",
            "unfused",
            "speed-up",
            "relative error",
        ]);
        for row in &self.rows {
            let unfused = row.unfused_seconds;
            table.add_row([
                Cell::new(format!("{} {}", row.op, row.direction)),
                Cell::new(row.dtype),
                Cell::new(row.threads),
                Cell::new(row.b),
                Cell::new(row.l),
                Cell::new(row.d),
                Cell::new(row.n),
                Cell::new(duration(row.seconds)),
                Cell::new(format!("{:.3}", row.ns_per_state_step)),
                Cell::new(unfused.map_or(String::new(), duration)),
                Cell::new(unfused.map_or(String::new(), |unfused| format!("{:.1}x", unfused / row.seconds))),
                Cell::new(format!("{:.1e}{}", row.relative_error, if row.within { "" } else { " !" })),
            ]);
        }
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table
    }
}

fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::F16 => "f16",
        DType::Bf16 => "bf16",
        _ => "other",
    }
}

/// Three digits or more and a unit.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} µs", s * 1e6),
        s if s < 1.0 => format!("{:.2} ms", s * 1e3),
        s => format!("{s:.2} s"),
    }
}
