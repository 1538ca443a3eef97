//! Errors of memories against the number of states, and times against the length, all logarithmic.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::memory::Memory;
use crate::times::{Times, duration};

const COLORS: [RGBColor; 4] = [BLUE, RED, RGBColor(30, 140, 60), BLACK];

/// A named line.
struct Line {
    name: &'static str,
    points: Vec<(f64, f64)>,
}

pub fn draw(path: &Path, memories: &[Memory], times: &[Times]) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, (1280, 480)).into_drawing_area();
    root.fill(&WHITE)?;
    let areas = root.split_evenly((1, 2));
    let line =
        |name, points: &[(usize, f64)]| Line { name, points: points.iter().map(|&(x, y)| (x as f64, y)).collect() };
    let errors: Vec<_> = memories.iter().map(|memory| line(memory.system, &memory.errors)).collect();
    let titles = ["The past, from the state alone", "states N", "error"];
    panel(&areas[0], titles, &errors, &|y| format!("{:.1} %", 100.0 * y))?;
    let seconds: Vec<_> = times.iter().map(|times| line(times.view, &times.seconds)).collect();
    panel(&areas[1], ["One thread, 64 channels", "sequence length L", "time"], &seconds, &duration)?;
    root.present()?;
    Ok(())
}

fn panel(
    area: &DrawingArea<SVGBackend, Shift>,
    [title, x_name, y_name]: [&str; 3],
    lines: &[Line],
    label: &dyn Fn(f64) -> String,
) -> Result<(), Box<dyn Error>> {
    let bounds = |values: &mut dyn Iterator<Item = f64>| {
        values.fold((f64::INFINITY, 0.0f64), |(low, high), value| (low.min(value), high.max(value)))
    };
    let points = || lines.iter().flat_map(|line| &line.points);
    let (x, y) = (bounds(&mut points().map(|p| p.0)), bounds(&mut points().map(|p| p.1)));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(96)
        .build_cartesian_2d((x.0 / 1.2..x.1 * 1.2).log_scale().base(2.0), (y.0 / 2.0..y.1 * 8.0).log_scale())?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 16))
        .x_desc(x_name)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_desc(y_name)
        .y_label_formatter(&|y| label(*y))
        .draw()?;
    for (line, color) in lines.iter().zip(COLORS) {
        chart
            .draw_series(LineSeries::new(line.points.iter().copied(), color.stroke_width(2)).point_size(3))?
            .label(line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 16))
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    Ok(())
}
