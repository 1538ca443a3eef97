//! The IDX format: a magic number of four bytes, of which the third is the type of the elements and the last the number of
//! dimensions; the dimensions, of four bytes each, the largest first; the elements. <http://yann.lecun.com/exdb/mnist/>

use std::fs;
use std::path::Path;

use candle_core::{Error, Result};

/// The type of the elements that MNIST has: bytes.
const BYTES: u8 = 8;

/// Images of one size, and what each of them shows.
#[derive(Debug, Clone, PartialEq)]
pub struct Images {
    pub rows: usize,
    pub columns: usize,
    /// `(images, rows, columns)`, from 0 for paper to 255 for ink.
    pub pixels: Vec<u8>,
    pub labels: Vec<u8>,
}

impl Images {
    /// Reads a pair of files, whose names begin with `name`.
    ///
    /// # Errors
    /// A file that cannot be read or is none of the format, by its path; images and labels that are not as many.
    pub fn read(folder: &Path, name: &str) -> Result<Self> {
        let read = |kind| {
            let path = folder.join(format!("{name}-{kind}-ubyte"));
            let bytes = fs::read(&path);
            let bytes = bytes.map_err(|error| {
                let path = path.display();
                Error::msg(format_args!("--data: expected a file {path} in the format of MNIST, got: {error}"))
            })?;
            Ok::<_, Error>((path.display().to_string(), bytes))
        };
        let ((images, pixels), (labels, marks)) = (read("images-idx3")?, read("labels-idx1")?);
        Self::parse((&images, &pixels), (&labels, &marks))
    }

    /// Parses the contents of a pair of files, each with its name.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn parse(images: (&str, &[u8]), labels: (&str, &[u8])) -> Result<Self> {
        let ([count, rows, columns], pixels) = elements(images.0, images.1)?;
        let ([labelled], marks) = elements(labels.0, labels.1)?;
        if labelled != count {
            let (images, labels) = (images.0, labels.0);
            return Err(Error::msg(format_args!(
                "{labels}: expected {count} labels, as {images} has images, got {labelled}"
            )));
        }
        if count == 0 || rows == 0 || columns == 0 {
            let got = format_args!("{count} of {rows} x {columns}");
            return Err(Error::msg(format_args!(
                "{}: expected at least one image of at least one pixel, got {got}",
                images.0
            )));
        }
        Ok(Self { rows, columns, pixels: pixels.to_vec(), labels: marks.to_vec() })
    }

    /// The number of images.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// The pixels of an image.
    pub fn size(&self) -> usize {
        self.rows * self.columns
    }
}

/// The dimensions and the elements of a file of bytes with `RANK` dimensions.
fn elements<'a, const RANK: usize>(name: &str, bytes: &'a [u8]) -> Result<([usize; RANK], &'a [u8])> {
    let refuse =
        |expected: String, got: String| Err(Error::msg(format_args!("{name}: expected {expected}, got {got}")));
    let magic = [0, 0, BYTES, RANK as u8];
    let header = 4 * (1 + RANK);
    if bytes.starts_with(&[0x1f, 0x8b]) {
        return refuse("an IDX file".into(), "a compressed one; gunzip unpacks it".into());
    }
    if !bytes.starts_with(&magic) {
        let got = format!("{:02x?}", &bytes[..bytes.len().min(4)]);
        return refuse(format!("an IDX file of bytes with {RANK} dimensions, which begins with {magic:02x?}"), got);
    }
    if bytes.len() < header {
        return refuse(format!("a header of {header} bytes"), format!("a file of {}", bytes.len()));
    }
    let (mut shape, mut count) = ([0; RANK], Some(1usize));
    for (size, word) in shape.iter_mut().zip(bytes[4..header].chunks_exact(4)) {
        *size = word.iter().fold(0, |size, &byte| size << 8 | usize::from(byte));
        count = count.and_then(|count| count.checked_mul(*size));
    }
    let elements = &bytes[header..];
    match count == Some(elements.len()) {
        true => Ok((shape, elements)),
        false => refuse(format!("{shape:?} elements after the header"), format!("{} bytes", elements.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::Images;

    fn idx(magic: [u8; 4], shape: &[u32], elements: &[u8]) -> Vec<u8> {
        let shape = shape.iter().flat_map(|size| size.to_be_bytes());
        magic.into_iter().chain(shape).chain(elements.iter().copied()).collect()
    }

    fn parse(images: &[u8], labels: &[u8]) -> Result<Images, String> {
        Images::parse(("images", images), ("labels", labels)).map_err(|error| error.to_string())
    }

    #[test]
    fn files_are_read_as_they_were_written() {
        let pixels: Vec<u8> = (0..2 * 3 * 300).map(|i| (i % 251) as u8).collect();
        let images = idx([0, 0, 8, 3], &[2, 3, 300], &pixels);
        let labels = idx([0, 0, 8, 1], &[2], &[7, 9]);
        let want = Images { rows: 3, columns: 300, pixels, labels: vec![7, 9] };
        assert_eq!(parse(&images, &labels).unwrap(), want);
    }

    #[test]
    fn what_is_no_such_file_is_refused_by_name() {
        let images = idx([0, 0, 8, 3], &[2, 1, 2], &[1, 2, 3, 4]);
        let labels = idx([0, 0, 8, 1], &[2], &[7, 9]);
        parse(&images, &labels).unwrap();
        let bad = [
            (labels.clone(), labels.clone(), "images: expected an IDX file of bytes with 3 dimensions"),
            (images.clone(), images.clone(), "labels: expected an IDX file of bytes with 1 dimensions"),
            (vec![0x1f, 0x8b, 8], labels.clone(), "gunzip"),
            (vec![], labels.clone(), "images: expected an IDX file"),
            (images[..10].to_vec(), labels.clone(), "a header of 16 bytes, got a file of 10"),
            (
                images[..19].to_vec(),
                labels.clone(),
                "images: expected [2, 1, 2] elements after the header, got 3 bytes",
            ),
            (idx([0, 0, 8, 3], &[u32::MAX; 3], &[]), labels.clone(), "elements after the header, got 0 bytes"),
            (
                images.clone(),
                idx([0, 0, 8, 1], &[3], &[1, 2, 3]),
                "labels: expected 2 labels, as images has images, got 3",
            ),
            (idx([0, 0, 8, 3], &[0, 1, 2], &[]), idx([0, 0, 8, 1], &[0], &[]), "at least one image"),
            (idx([0, 0, 8, 3], &[2, 0, 2], &[]), labels.clone(), "at least one pixel"),
            // Floats, type 0x0d.
            (idx([0, 0, 13, 3], &[2, 1, 2], &[0; 16]), labels.clone(), "got [00, 00, 0d, 03]"),
        ];
        for (images, labels, message) in bad {
            let error = parse(&images, &labels).unwrap_err();
            assert!(error.contains(message), "{error}: should say {message}");
        }
    }
}
