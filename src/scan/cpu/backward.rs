use super::*;
pub(super) fn run<T: Element>(_isa: Isa, _problem: &Problem<T>, _checkpoints: &[f32], _d: OutputGradients<T>, _g: GradientsMut<T>) {
    todo!()
}
