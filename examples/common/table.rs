//! Tables as the README has them.

use comfy_table::{Cell, CellAlignment, Table, presets};

/// A table with numbers from the second column on.
pub fn table<C: Into<Cell>>(
    header: impl IntoIterator<Item = &'static str>,
    rows: impl IntoIterator<Item = impl IntoIterator<Item = C>>,
) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header.into_iter().map(Cell::new).collect::<Vec<_>>());
    for row in rows {
        table.add_row(row.into_iter().map(Into::into).collect::<Vec<_>>());
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A share in percent. 100 is written only for all of them.
pub fn percent(right: usize, of: usize) -> String {
    let tenths = right * 1000 / of;
    format!("{}.{} %", tenths / 10, tenths % 10)
}
