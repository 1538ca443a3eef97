//! What the programs share that learn to tell images apart: the images, what they are drawn from, and training.
#![allow(dead_code, reason = "each program uses a part")]

mod idx;
mod options;
mod training;

use std::path::Path;

use candle_core::{Device, Error, Result, Tensor};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;

pub use idx::Images;
pub use options::{Base, Options};
pub use training::{Model, Recipe, train};

#[path = "../common/table.rs"]
mod table;
pub use table::{percent, table};

/// Images to train on and others that are held out.
#[derive(Debug, Clone)]
pub struct Digits {
    pub train: Images,
    pub test: Images,
    /// Of the pixels to train on, 0 to 255.
    mean: f32,
    deviation: f32,
}

/// Images as a model takes them.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `(images, rows, columns)` of `f32`, of mean 0 and variance 1 over what is trained on.
    pub pixels: Tensor,
    /// `(images)`.
    pub labels: Tensor,
}

impl Digits {
    /// The images that the program holds, of 8 x 8 pixels: see `README.md` in this folder.
    ///
    /// # Errors
    /// None, where the program was built from whole files.
    pub fn built_in() -> Result<Self> {
        macro_rules! pair {
            ($name:literal) => {
                Images::parse(
                    (concat!($name, "-images"), include_bytes!(concat!("data/", $name, "-images-idx3-ubyte"))),
                    (concat!($name, "-labels"), include_bytes!(concat!("data/", $name, "-labels-idx1-ubyte"))),
                )
            };
        }
        Self::new(pair!("train")?, pair!("t10k")?)
    }

    /// The four files of a folder, which have the names of MNIST's.
    ///
    /// # Errors
    /// Those of [`Images::read`]; images of two sizes, or of no contrast.
    pub fn read(folder: &Path) -> Result<Self> {
        Self::new(Images::read(folder, "train")?, Images::read(folder, "t10k")?)
    }

    fn new(train: Images, test: Images) -> Result<Self> {
        if (test.rows, test.columns) != (train.rows, train.columns) {
            let [expected, got] = [&train, &test].map(|images| format!("{} x {}", images.rows, images.columns));
            return Err(Error::msg(format_args!(
                "--data: expected images of one size, {expected}, got {got} held out"
            )));
        }
        let count = train.pixels.len() as f64;
        let mean = train.pixels.iter().map(|&pixel| f64::from(pixel)).sum::<f64>() / count;
        let variance = train.pixels.iter().map(|&pixel| (f64::from(pixel) - mean).powi(2)).sum::<f64>() / count;
        if variance == 0.0 {
            return Err(Error::msg("--data: expected images with something on them, got pixels that are all the same"));
        }
        Ok(Self { train, test, mean: mean as f32, deviation: variance.sqrt() as f32 })
    }

    /// The number of classes: one more than the largest label.
    pub fn classes(&self) -> usize {
        let labels = self.train.labels.iter().chain(&self.test.labels);
        1 + labels.copied().max().map_or(0, usize::from)
    }

    /// Some of the images to train on, each moved by up to `shift` pixels along each axis, with paper where there was none.
    pub fn training_batch(&self, picks: &[usize], shift: usize, random: &mut StdRng, device: &Device) -> Result<Batch> {
        let mut offset = || random.random_range(0..=2 * shift) as isize - shift as isize;
        self.batch(&self.train, picks, || [offset(), offset()], device)
    }

    /// The images that are held out, so many at a time.
    pub fn test_batches(&self, size: usize, device: &Device) -> Result<Vec<Batch>> {
        let picks: Vec<_> = (0..self.test.len()).collect();
        picks.chunks(size).map(|picks| self.batch(&self.test, picks, || [0, 0], device)).collect()
    }

    fn batch(
        &self,
        images: &Images,
        picks: &[usize],
        mut offset: impl FnMut() -> [isize; 2],
        device: &Device,
    ) -> Result<Batch> {
        let &Images { rows, columns, .. } = images;
        let mut pixels = Vec::with_capacity(picks.len() * images.size());
        for &pick in picks {
            let image = &images.pixels[pick * images.size()..][..images.size()];
            let [down, right] = offset();
            for row in 0..rows {
                for column in 0..columns {
                    let from = row.checked_add_signed(-down).zip(column.checked_add_signed(-right));
                    let from = from.filter(|&(row, column)| row < rows && column < columns);
                    let level = from.map_or(0, |(row, column)| image[row * columns + column]);
                    pixels.push((f32::from(level) - self.mean) / self.deviation);
                }
            }
        }
        let labels: Vec<_> = picks.iter().map(|&pick| u32::from(images.labels[pick])).collect();
        Ok(Batch {
            pixels: Tensor::from_vec(pixels, (picks.len(), rows, columns), device)?,
            labels: Tensor::new(labels, device)?,
        })
    }
}

/// Numbers below `count` in random order.
pub fn shuffled(count: usize, random: &mut StdRng) -> Vec<usize> {
    let mut order: Vec<_> = (0..count).collect();
    order.shuffle(random);
    order
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::{Digits, Images, shuffled};

    #[test]
    fn the_built_in_digits_are_all_there() {
        let digits = Digits::built_in().unwrap();
        assert_eq!((digits.train.len(), digits.test.len(), digits.classes()), (1437, 360, 10));
        assert_eq!((digits.train.rows, digits.train.columns), (8, 8));
        // The first is a zero, with paper in its middle.
        assert_eq!((digits.train.labels[0], digits.train.pixels[8 * 3 + 3]), (0, 0));
        let batches = digits.test_batches(100, &Device::Cpu).unwrap();
        assert_eq!(batches.iter().map(|batch| batch.labels.elem_count()).sum::<usize>(), 360);
    }

    #[test]
    fn images_move_and_keep_their_ink() {
        // One spot in the middle of an image: wherever it goes, it is there once, and at most as far as the shift.
        let mut pixels = vec![0; 25];
        pixels[12] = 255;
        let images = Images { rows: 5, columns: 5, pixels, labels: vec![3] };
        let digits = Digits::new(images.clone(), images).unwrap();
        let mut random = StdRng::seed_from_u64(1);
        let (mut seen, paper) = ([false; 25], -digits.mean / digits.deviation);
        for _ in 0..300 {
            let batch = digits.training_batch(&[0], 1, &mut random, &Device::Cpu).unwrap();
            let pixels = batch.pixels.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let ink: Vec<_> = (0..25).filter(|&at| pixels[at] != paper).collect();
            assert_eq!(ink.len(), 1);
            let at = ink[0];
            assert!((1..=3).contains(&(at / 5)) && (1..=3).contains(&(at % 5)), "{at}");
            seen[at] = true;
        }
        assert_eq!(seen.iter().filter(|&&seen| seen).count(), 9);
        let mut order = shuffled(100, &mut random);
        assert!(order.windows(2).any(|pair| pair[0] > pair[1]));
        order.sort_unstable();
        assert!(order.into_iter().eq(0..100));
    }
}
