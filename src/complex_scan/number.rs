//! Complex numbers in `f64`.

use std::ops::{Add, AddAssign, Mul};

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Number {
    pub re: f64,
    pub im: f64,
}

impl Number {
    pub fn exp(self) -> Self {
        let (sin, cos) = self.im.sin_cos();
        Self { re: cos, im: sin } * self.re.exp()
    }

    pub fn conj(self) -> Self {
        Self { im: -self.im, ..self }
    }
}

impl Mul for Number {
    type Output = Self;

    fn mul(self, y: Self) -> Self {
        Self { re: self.re * y.re - self.im * y.im, im: self.re * y.im + self.im * y.re }
    }
}

impl Mul<f64> for Number {
    type Output = Self;

    fn mul(self, y: f64) -> Self {
        Self { re: self.re * y, im: self.im * y }
    }
}

impl Add for Number {
    type Output = Self;

    fn add(self, y: Self) -> Self {
        Self { re: self.re + y.re, im: self.im + y.im }
    }
}

impl AddAssign for Number {
    fn add_assign(&mut self, y: Self) {
        *self = *self + y;
    }
}
