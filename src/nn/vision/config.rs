//! What a model of images is made of.

use candle_core::Result;

use crate::nn::{BackboneConfig, COUNTABLE, MambaConfig, argument, sum};

/// A model of images. [`VisionConfig::new`] gives Vision Mamba's; change what differs.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// The rows and columns of pixels of an image.
    pub image: [usize; 2],
    /// The numbers of a pixel: 3 for colours, 1 for shades of grey.
    pub channels: usize,
    /// The rows, and as many columns, of a patch.
    pub patch: usize,
    /// The pixels from the beginning of a patch to that of the next, along both axes. As many as a patch has where patches
    /// lie side by side; fewer where they overlap. Pixels after the last whole patch are not read.
    pub stride: usize,
    /// The classes.
    pub classes: usize,
    /// Whether a learnt token in the middle of the patches gathers what is seen, of which the head reads. If not, the head
    /// reads the mean over the patches.
    pub class_token: bool,
    /// The layers. Vision Mamba's mixers have two directions, whose outputs are halved; those of a vision Transformer are
    /// attention that is not [causal](crate::nn::AttentionConfig::causal), with a feed-forward part each.
    pub backbone: BackboneConfig,
}

impl VisionConfig {
    /// `n_layer` blocks of width `d_model` in two directions on coloured images, in patches side by side, with a token in
    /// their middle.
    pub fn new(image: [usize; 2], patch: usize, classes: usize, n_layer: usize, d_model: usize) -> Self {
        let mixer = MambaConfig { bidirectional: true, average_directions: true, ..MambaConfig::new(d_model) };
        let backbone = BackboneConfig::with_mixer(n_layer, mixer);
        Self { image, channels: 3, patch, stride: patch, classes, class_token: true, backbone }
    }

    /// The rows and columns of patches; 0 where an image is smaller than a patch.
    pub fn grid(&self) -> [usize; 2] {
        let along = |pixels: usize| match (pixels.checked_sub(self.patch), self.stride) {
            (None, _) | (_, 0) => 0,
            (Some(rest), stride) => rest / stride + 1,
        };
        self.image.map(along)
    }

    /// The steps of a sequence: the patches, and the token in their middle.
    pub fn steps(&self) -> usize {
        // What overflows is refused by `check`.
        let [rows, columns] = self.grid();
        rows.saturating_mul(columns).saturating_add(usize::from(self.class_token))
    }

    /// The numbers of a patch.
    pub(super) fn patch_size(&self) -> usize {
        self.channels.saturating_mul(self.patch).saturating_mul(self.patch)
    }

    pub(super) fn check(&self) -> Result<()> {
        let sizes =
            [("channels", self.channels), ("patch", self.patch), ("stride", self.stride), ("classes", self.classes)];
        for (name, size) in sizes {
            if size == 0 {
                return Err(argument(name, "at least 1", size));
            }
        }
        let [rows, columns] = self.image;
        if self.grid().contains(&0) {
            let expected = format_args!("at least one patch of {0} x {0}", self.patch);
            return Err(argument("image", expected, format_args!("{rows} x {columns}")));
        }
        // Pixels are picked by indices of `u32`.
        if rows.checked_mul(columns).is_none_or(|pixels| u32::try_from(pixels).is_err()) {
            return Err(argument("image", "less than 2^32 pixels", format_args!("{rows} x {columns}")));
        }
        self.backbone.check()?;
        self.parameter_count().map(|_| ())
    }

    /// The number of parameters.
    ///
    /// # Errors
    /// More than can be counted.
    pub fn parameter_count(&self) -> Result<usize> {
        let d_model = self.backbone.d_model();
        let ends = sum(&[
            [self.patch_size(), d_model, 1],
            [self.steps(), d_model, 1],
            [d_model, 1 + usize::from(self.class_token), 1],
            [self.classes, d_model, 1],
            [self.classes, 1, 1],
        ]);
        let count = ends.and_then(|count| count.checked_add(self.backbone.parameter_count().ok()?));
        count.filter(|count| *count <= COUNTABLE).ok_or_else(|| {
            let got = format_args!("{:?}, {} and {}", self.image, self.patch, self.classes);
            argument("image, patch, classes", "sizes whose parameters can be counted", got)
        })
    }
}
