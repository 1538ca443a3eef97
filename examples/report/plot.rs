//! Time against sequence length, both logarithmic: the scan, the scan unfused, attention.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::output::{Row, Rows, duration};
use crate::run::{Model, Plan};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Points = Vec<(f64, f64)>;

/// Draws one panel for each model, at the largest number of threads.
pub fn draw(path: &Path, plan: &Plan, rows: &Rows) -> Result<(), Box<dyn Error>> {
    let threads = plan.threads.iter().copied().max().unwrap_or(1);
    let root = SVGBackend::new(path, (640 * plan.models.len() as u32, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, model) in root.split_evenly((1, plan.models.len())).iter().zip(plan.models) {
        panel(area, model, threads, rows)?;
    }
    root.present()?;
    Ok(())
}

fn panel(area: &Area, model: &Model, threads: usize, rows: &Rows) -> Result<(), Box<dyn Error>> {
    let points = |op: &str, direction: &str, time: fn(&Row) -> Option<f64>| -> Points {
        let rows = rows
            .rows
            .iter()
            .filter(|row| (row.op, row.direction, row.threads, row.d) == (op, direction, threads, model.d_inner));
        rows.filter_map(|row| Some((row.l as f64, time(row)?))).collect()
    };
    let series = [
        ("selective scan", BLUE, points("selective_scan", "forward", |row| Some(row.seconds))),
        ("the same unfused", RED, points("selective_scan", "forward", |row| row.unfused_seconds)),
        ("softmax attention", BLACK, points("attention", "forward", |row| Some(row.seconds))),
    ];
    let Some((x, y)) = ranges(&series.iter().flat_map(|(_, _, points)| points.clone()).collect::<Points>()) else {
        return Ok(());
    };
    let title = format!("{}, D {}, N {}, forward, {threads} threads", model.name, model.d_inner, model.d_state);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(96)
        .build_cartesian_2d((x.0..x.1).log_scale().base(2.0), (y.0..y.1).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 16))
        .x_desc("sequence length L")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_desc("time")
        .y_label_formatter(&|y| duration(*y))
        .draw()?;
    for (label, color, points) in series {
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)).point_size(3))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font(("sans-serif", 16))
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    Ok(())
}

/// Ranges that hold all points, with some room.
fn ranges(points: &[(f64, f64)]) -> Option<((f64, f64), (f64, f64))> {
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, 0.0f64), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (x, y) = (bounds(&mut points.iter().map(|p| p.0)), bounds(&mut points.iter().map(|p| p.1)));
    (!points.is_empty()).then_some(((x.0 / 1.2, x.1 * 1.2), (y.0 / 2.0, y.1 * 4.0)))
}
