//! A panel for each of what was measured.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::measure::Row;
use crate::models::Kind;
use crate::output::size;

const COLORS: [RGBColor; 4] = [BLUE, RED, RGBColor(30, 140, 60), BLACK];

pub fn draw(path: &Path, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (1280, 840)).into_drawing_area();
    root.fill(&WHITE)?;
    let areas = root.split_evenly((2, 3));
    bits(&areas[0], rows)?;
    type Value = fn(&Row) -> Option<f64>;
    let panels: [(&str, &str, Value); 4] = [
        ("Training", "tokens/s", |row| row.train_tokens_per_s),
        ("Prefill", "tokens/s", |row| Some(row.prefill_tokens_per_s)),
        ("Decoding", "tokens/s", |row| Some(row.decode_tokens_per_s)),
        ("State of a sequence", "bytes", |row| Some(row.state_bytes as f64)),
    ];
    for (area, (title, unit, value)) in areas[1..].iter().zip(panels) {
        let label: &dyn Fn(f64) -> String = match unit {
            "bytes" => &|y| size(y as usize),
            _ => &|y| format!("{y:.0}"),
        };
        lines(area, title, unit, rows, value, label)?;
    }
    legend(&areas[5])?;
    root.present()?;
    Ok(())
}

/// The bits of each model as bars.
fn bits(area: &DrawingArea<SVGBackend, Shift>, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let all: Vec<_> = Kind::ALL
        .iter()
        .filter_map(|kind| Some(rows.iter().find(|row| row.model == kind.name())?.bits_per_byte))
        .collect();
    let most = all.iter().copied().fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("Bits per held-out byte", ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(32)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..all.len() as f64, 0.0..1.15 * most)?;
    let name =
        |x: &f64| Kind::ALL.get(*x as usize).filter(|_| x.fract() == 0.5).map_or(String::new(), |k| k.name().into());
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_labels(9)
        .x_label_formatter(&name)
        .label_style(("sans-serif", 14))
        .draw()?;
    for (i, (bits, color)) in all.iter().zip(COLORS).enumerate() {
        let x = i as f64;
        let bar = Rectangle::new([(x + 0.2, 0.0), (x + 0.8, *bits)], color.filled());
        let text = Text::new(format!("{bits:.3}"), (x + 0.3, bits + 0.08 * most), ("sans-serif", 15));
        chart.draw_series([bar])?;
        chart.draw_series([text])?;
    }
    Ok(())
}

/// A line of each model by the length, both scales logarithmic.
fn lines(
    area: &DrawingArea<SVGBackend, Shift>,
    title: &str,
    unit: &str,
    rows: &[Row],
    value: fn(&Row) -> Option<f64>,
    label: &dyn Fn(f64) -> String,
) -> Result<(), Box<dyn Error>> {
    let of = |kind: Kind| -> Vec<(f64, f64)> {
        let rows = rows.iter().filter(|row| row.model == kind.name());
        rows.filter_map(|row| Some((row.length as f64, value(row)?))).collect()
    };
    let points = || Kind::ALL.into_iter().flat_map(of);
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, 0.0f64), |(low, high), value| (low.min(value), high.max(value)))
    };
    let (x, y) = (bounds(&mut points().map(|p| p.0)), bounds(&mut points().map(|p| p.1)));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(96)
        .build_cartesian_2d((x.0 / 1.2..x.1 * 1.2).log_scale().base(4.0), (y.0 / 1.5..y.1 * 1.5).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 14))
        .x_desc("length")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_desc(unit)
        .y_label_formatter(&|y| label(*y))
        .draw()?;
    for (kind, color) in Kind::ALL.into_iter().zip(COLORS) {
        chart.draw_series(LineSeries::new(of(kind), color.stroke_width(2)).point_size(3))?;
    }
    Ok(())
}

fn legend(area: &DrawingArea<SVGBackend, Shift>) -> Result<(), Box<dyn Error>> {
    for (i, (kind, color)) in Kind::ALL.into_iter().zip(COLORS).enumerate() {
        let y = 80 + 36 * i as i32;
        area.draw(&PathElement::new([(60, y), (100, y)], color.stroke_width(3)))?;
        area.draw(&Text::new(kind.name(), (116, y - 9), ("sans-serif", 20)))?;
    }
    Ok(())
}
