//! The results as a table, and what there is to say about them.

use comfy_table::{Cell, CellAlignment, Table, presets};

use crate::Plan;
use crate::measure::Row;

pub fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header([
        "model",
        "parameters",
        "learning rate",
        "bits/byte",
        "length",
        "training, tokens/s",
        "prefill, tokens/s",
        "decoding, tokens/s",
        "state",
    ]);
    let mut last = "";
    for row in rows {
        let is_first = last != row.model;
        last = &row.model;
        let once = |text: String| if is_first { text } else { String::new() };
        table.add_row([
            Cell::new(once(row.model.clone())),
            Cell::new(once(row.parameters.to_string())),
            Cell::new(once(row.learning_rate.map_or(String::new(), |rate| rate.to_string()))),
            Cell::new(once(format!("{:.3}", row.bits_per_byte))),
            Cell::new(row.length),
            Cell::new(row.train_tokens_per_s.map_or(String::new(), |rate| format!("{rate:.0}"))),
            Cell::new(format!("{:.0}", row.prefill_tokens_per_s)),
            Cell::new(format!("{:.0}", row.decode_tokens_per_s)),
            Cell::new(size(row.state_bytes)),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// What came of the learning rates of a model.
pub struct Run {
    pub model: &'static str,
    /// Rates, and the bits per byte of each.
    pub rates: Vec<(f64, f64)>,
    pub chosen: f64,
}

pub fn runs(runs: &[Run]) -> Table {
    let rates = || runs.iter().take(1).flat_map(|run| run.rates.iter().map(|(rate, _)| rate.to_string()));
    let mut table = Table::new();
    table
        .load_style(presets::ASCII_MARKDOWN)
        .set_header(["model".to_string()].into_iter().chain(rates()).chain(["chosen".into()]).collect::<Vec<_>>());
    for run in runs {
        let bits = run.rates.iter().map(|(_, bits)| format!("{bits:.3}"));
        table.add_row([run.model.to_string()].into_iter().chain(bits).chain([run.chosen.to_string()]));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Bytes with a unit.
pub fn size(bytes: usize) -> String {
    match bytes as f64 {
        b if b < 1e6 => format!("{:.1} kB", b / 1e3),
        b => format!("{:.1} MB", b / 1e6),
    }
}

/// How the results came about.
pub fn notes(rows: &[Row], plan: &Plan, train: usize, held_out: usize) -> String {
    let first = rows.first().map_or(0, |row| row.parameters);
    let most = rows.iter().map(|row| row.parameters.abs_diff(first)).max().unwrap_or(0);
    format!(
        "Of {train} bytes to learn from each has seen {} in {} steps of {} x {} (AdamW, weight decay 0.1, clipped to 1, a cosine to \
         a tenth); the learning rate is the best of {:?} in runs of {} steps. Bits are those of {held_out} bytes held out, in texts \
         as long as those of training. Parameters differ by {:.1} % at most. Speeds are the best of several calls. The state of \
         attention is that of the tokens that are there. Threads: {}.",
        plan.steps * plan.batch * plan.length,
        plan.steps,
        plan.batch,
        plan.length,
        plan.rates,
        plan.short_steps(),
        100.0 * most as f64 / first.max(1) as f64,
        std::thread::available_parallelism().map_or(1, |threads| threads.get()),
    )
}
