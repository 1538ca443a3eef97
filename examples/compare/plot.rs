//! A panel for each of what was measured.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
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
            "bytes" => &|y| size(y.round() as usize),
            _ => &|y| thousands(y),
        };
        lines(area, title, unit, rows, value, label)?;
    }
    legend(&areas[5], rows)?;
    root.present()?;
    Ok(())
}

/// The bits of each model as bars.
fn bits(area: &DrawingArea<SVGBackend, Shift>, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let of = |kind: Kind| rows.iter().find(|row| row.model == kind.name());
    let all: Vec<_> = Kind::ALL.into_iter().filter_map(|kind| Some((kind, of(kind)?.bits_per_byte))).collect();
    let most = all.iter().map(|(_, bits)| *bits).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .caption("Bits per held-out byte", ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(32)
        .y_label_area_size(72)
        .build_cartesian_2d(0.0..all.len() as f64, 0.0..1.15 * most)?;
    let name = |x: &f64| {
        all.get(*x as usize).filter(|_| x.fract() == 0.5).map_or(String::new(), |(kind, _)| kind.name().into())
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(0)
        .x_labels(2 * all.len() + 1)
        .x_label_formatter(&name)
        .label_style(("sans-serif", 14))
        .draw()?;
    for (i, &(kind, bits)) in all.iter().enumerate() {
        let x = i as f64;
        let bar = Rectangle::new([(x + 0.2, 0.0), (x + 0.8, bits)], COLORS[kind as usize].filled());
        let text = Text::new(format!("{bits:.3}"), (x + 0.33, bits + 0.06 * most), ("sans-serif", 15));
        chart.draw_series([bar])?;
        chart.draw_series([text])?;
    }
    Ok(())
}

/// A line of each model by the length, both scales logarithmic: what is drawn are logarithms.
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
        rows.filter_map(|row| Some(((row.length as f64).log2(), value(row)?.log10()))).collect()
    };
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)))
    };
    // All panels have the lengths of all rows, so that one can be held beside another.
    let mut lengths: Vec<_> = rows.iter().map(|row| (row.length as f64).log2()).collect();
    lengths.sort_by(f64::total_cmp);
    lengths.dedup();
    let x = bounds(&mut lengths.iter().copied());
    let y = bounds(&mut Kind::ALL.into_iter().flat_map(of).map(|point| point.1));
    let y = y.0 - 0.15..y.1 + 0.15;
    let x_axis = Axis { range: x.0 - 0.3..x.1 + 0.3, labels: lengths };
    let y_axis = Axis { labels: round_numbers(y.clone()), range: y };
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(96)
        .build_cartesian_2d(x_axis, y_axis)?;
    chart
        .configure_mesh()
        .max_light_lines(0)
        .label_style(("sans-serif", 14))
        .x_desc("length")
        .x_label_formatter(&|x| thousands(x.exp2()))
        .y_desc(unit)
        .y_label_formatter(&|y| label(10f64.powf(*y)))
        .draw()?;
    for (kind, color) in Kind::ALL.into_iter().zip(COLORS) {
        chart.draw_series(LineSeries::new(of(kind), color.stroke_width(2)).point_size(3))?;
    }
    Ok(())
}

/// An axis with labels at these numbers alone.
struct Axis {
    range: Range<f64>,
    labels: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (low, high): (i32, i32)) -> i32 {
        let share = (value - self.range.start) / (self.range.end - self.range.start);
        low + (f64::from(high - low) * share).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.labels.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// The logarithms of 1, 2 and 5 times the powers of ten in a range, or of these powers alone where there are many.
fn round_numbers(range: Range<f64>) -> Vec<f64> {
    let factors = if range.end - range.start < 2.5 { &[1.0, 2.0, 5.0][..] } else { &[1.0] };
    let decades = range.start.floor() as i32..=range.end.ceil() as i32;
    let all = decades.flat_map(|decade| factors.iter().map(move |factor: &f64| factor.log10() + f64::from(decade)));
    all.filter(|number| range.contains(number)).collect()
}

/// A whole number, with commas.
fn thousands(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// What the colours stand for.
fn legend(area: &DrawingArea<SVGBackend, Shift>, rows: &[Row]) -> Result<(), Box<dyn Error>> {
    let row = |kind: Kind| rows.iter().find(|row| row.model == kind.name());
    let drawn = Kind::ALL.into_iter().zip(COLORS).filter_map(|(kind, color)| Some((kind, color, row(kind)?)));
    for (i, (kind, color, row)) in drawn.enumerate() {
        let y = 70 + 64 * i as i32;
        area.draw(&PathElement::new([(60, y), (100, y)], color.stroke_width(3)))?;
        area.draw(&Text::new(kind.name(), (116, y - 10), ("sans-serif", 20)))?;
        let rate = row.learning_rate.map_or(String::new(), |rate| format!(", learning rate {rate}"));
        let more = format!("{} parameters{rate}", thousands(row.parameters as f64));
        area.draw(&Text::new(more, (116, y + 14), ("sans-serif", 14)))?;
    }
    Ok(())
}
