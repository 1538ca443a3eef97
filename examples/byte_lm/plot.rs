//! Bits per byte against steps: of training, of the held-out text, and of the n-gram model.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use crate::checkpoint::Run;

pub fn draw(path: &Path, run: &Run, ngram: f64) -> Result<(), Box<dyn Error>> {
    let points = |curve: &[(usize, f64)]| curve.iter().map(|&(step, bits)| (step as f64, bits)).collect::<Vec<_>>();
    let steps = run.options.steps.get() as f64;
    let series = [
        ("training".to_string(), RGBColor(150, 180, 220), points(&run.curves.train)),
        ("held out".into(), BLUE, points(&run.curves.held_out)),
        (
            format!("n-gram of order {}, held out", crate::train::BASELINE_ORDER),
            RED,
            vec![(0.0, ngram), (steps, ngram)],
        ),
    ];
    let lowest = series.iter().flat_map(|(_, _, points)| points).map(|point| point.1).fold(f64::INFINITY, f64::min);
    let root = SVGBackend::new(path, (720, 440)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(14)
        .x_label_area_size(48)
        .y_label_area_size(60)
        // The first steps, at up to 8 bits, would leave no room for the rest.
        .build_cartesian_2d(0.0..steps, (lowest - 0.2).max(0.0)..(ngram + 2.0))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .label_style(("sans-serif", 15))
        .x_desc("step")
        .x_label_formatter(&|x| format!("{x:.0}"))
        .y_desc("bits per byte")
        .y_label_formatter(&|y| format!("{y:.1}"))
        .draw()?;
    for (label, color, points) in series {
        chart
            .draw_series(LineSeries::new(points, color.stroke_width(2)))?
            .label(label)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font(("sans-serif", 15))
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}
