//! The macro that makes structs of a list of tensors, [`tensors!`]; the others here are its parts.

/// Declares an operator's tensors: the struct of them over a [`Kind`], and the structs that callers fill in.
///
/// ```text
/// tensors! {
///     /// What the struct says of itself.
///     pub struct Tensors(Sizes { batch, length, d_inner });
///     required {
///         /// What the tensor is; its shape is added.
///         u: activation(batch, length, d_inner),
///     }
///     optional { d: parameter(d_inner), }
///     settings<'a> { options: Options = Options::default(), }
///     /// What the struct of views says of itself.
///     views Inputs;
///     /// What the struct of candle's tensors says of itself.
///     candle Scan;
///     params scan::Inputs;
/// }
/// ```
///
/// A tensor is an `activation`, a `parameter` (or state), or a `projection`, which has two shapes: if it varies and, after
/// the semicolon, if it is constant. Shapes are made of the names in the pattern of sizes. Settings are what a caller gives
/// beside the tensors; where a second type follows after `|`, it is that beside candle's. The kernels' parameters, in
/// `kernels/*/params.cuh`, have a field of each tensor's name; an operator without kernels has no last line.
macro_rules! tensors {
    (
        $(#[$doc:meta])*
        pub struct $Tensors:ident($Sizes:ident { $($size:tt)* });
        required { $($(#[$rdoc:meta])* $r:ident: $rrole:ident($($rdims:tt)*),)* }
        optional { $($(#[$odoc:meta])* $o:ident: $orole:ident($($odims:tt)*),)* }
        settings<$a:lifetime> { $($(#[$sdoc:meta])* $s:ident: $setting:ty $(| $candle:ty)? = $default:expr,)* }
        $(#[$vdoc:meta])* views $Views:ident;
        $(#[$cdoc:meta])* candle $Candle:ident;
        params $module:ident::$Params:ident;
    ) => {
        $crate::kinds::declare::tensors! {
            $(#[$doc])*
            pub struct $Tensors($Sizes { $($size)* });
            required { $($(#[$rdoc])* $r: $rrole($($rdims)*),)* }
            optional { $($(#[$odoc])* $o: $orole($($odims)*),)* }
            settings<$a> { $($(#[$sdoc])* $s: $setting $(| $candle)? = $default,)* }
            $(#[$vdoc])* views $Views;
            $(#[$cdoc])* candle $Candle;
        }

        #[cfg(feature = "cuda")]
        impl $Tensors<$crate::cuda::DeviceViews> {
            /// The tensors as kernels take them, with the other parameters from `rest`.
            pub(crate) fn params(
                self,
                rest: $crate::cuda::params::$module::$Params,
            ) -> $crate::cuda::params::$module::$Params {
                $crate::cuda::params::$module::$Params {
                    $($r: self.$r.into(),)*
                    $($o: $crate::cuda::or_null(self.$o),)*
                    ..rest
                }
            }
        }
    };
    (
        $(#[$doc:meta])*
        pub struct $Tensors:ident($Sizes:ident { $($size:tt)* });
        required { $($(#[$rdoc:meta])* $r:ident: $rrole:ident($($rdims:tt)*),)* }
        optional { $($(#[$odoc:meta])* $o:ident: $orole:ident($($odims:tt)*),)* }
        settings<$a:lifetime> { $($(#[$sdoc:meta])* $s:ident: $setting:ty $(| $candle:ty)? = $default:expr,)* }
        $(#[$vdoc:meta])* views $Views:ident;
        $(#[$cdoc:meta])* candle $Candle:ident;
    ) => {
        $(#[$doc])*
        pub struct $Tensors<K: $crate::kinds::Kind> {
            $(
                $(#[$rdoc])*
                #[doc = $crate::kinds::declare::shape_doc!($rrole($($rdims)*))]
                pub $r: $crate::kinds::declare::of_kind!(K, $rrole($($rdims)*)),
            )*
            $(
                $(#[$odoc])*
                #[doc = $crate::kinds::declare::shape_doc!($orole($($odims)*))]
                pub $o: Option<$crate::kinds::declare::of_kind!(K, $orole($($odims)*))>,
            )*
        }

        #[allow(dead_code, reason = "not every operator has gradients")]
        impl<K: $crate::kinds::Kind> $Tensors<K> {
            #[doc = concat!(
                "Those that every call has; the others are absent. Add them with struct update syntax: `",
                stringify!($Tensors), " { …, ..", stringify!($Tensors), "::new(…) }`.",
            )]
            pub fn new($($r: $crate::kinds::declare::of_kind!(K, $rrole($($rdims)*))),*) -> Self {
                Self { $($r,)* $($o: None,)* }
            }

            /// All tensors as another kind.
            pub(crate) fn map<L: $crate::kinds::Kind, F: $crate::kinds::Map<K, L>>(
                self,
                f: &mut F,
            ) -> std::result::Result<$Tensors<L>, F::Error> {
                Ok($Tensors {
                    $($r: $crate::kinds::declare::apply!(f, $r, self.$r, $rrole($($rdims)*)),)*
                    $($o: match self.$o {
                        Some(tensor) => Some($crate::kinds::declare::apply!(f, $o, tensor, $orole($($odims)*))),
                        None => None,
                    },)*
                })
            }

            /// These tensors beside others, which are their gradients: an error names one that is there without the other.
            pub(crate) fn zip<L: $crate::kinds::Kind>(
                self,
                other: $Tensors<L>,
            ) -> $crate::Result<$Tensors<$crate::kinds::Pair<K, L>>> {
                Ok($Tensors {
                    $($r: $crate::kinds::declare::pair_up!($r, self.$r, other.$r, $rrole($($rdims)*)),)*
                    $($o: {
                        let field = $crate::kinds::declare::field!($o, $orole($($odims)*));
                        match $crate::kinds::pair(field, self.$o, other.$o)? {
                            Some((ours, theirs)) => {
                                Some($crate::kinds::declare::pair_up!($o, ours, theirs, $orole($($odims)*)))
                            }
                            None => None,
                        }
                    },)*
                })
            }

            /// These tensors, each with its shape.
            #[allow(unused_variables, reason = "not every size is of a tensor's shape")]
            pub(crate) fn shaped(self, sizes: $Sizes) -> $Tensors<$crate::kinds::Shaped<K>> {
                let $Sizes { $($size)* } = sizes;
                $Tensors {
                    $($r: $crate::kinds::declare::shaped!(self.$r, $rrole($($rdims)*)),)*
                    $($o: self.$o.map(|tensor| $crate::kinds::declare::shaped!(tensor, $orole($($odims)*))),)*
                }
            }

            pub(crate) fn by_ref(&self) -> $Tensors<$crate::kinds::Ref<'_, K>> {
                $Tensors {
                    $($r: $crate::kinds::declare::by!(by_ref, &self.$r, $rrole),)*
                    $($o: self.$o.as_ref().map(|tensor| $crate::kinds::declare::by!(by_ref, tensor, $orole)),)*
                }
            }

            pub(crate) fn by_mut(&mut self) -> $Tensors<$crate::kinds::Mut<'_, K>> {
                $Tensors {
                    $($r: $crate::kinds::declare::by!(by_mut, &mut self.$r, $rrole),)*
                    $($o: self.$o.as_mut().map(|tensor| $crate::kinds::declare::by!(by_mut, tensor, $orole)),)*
                }
            }
        }

        impl<K: $crate::kinds::Kind> Clone for $Tensors<K>
        where
            $($crate::kinds::declare::of_kind!(K, $rrole($($rdims)*)): Clone,)*
            $($crate::kinds::declare::of_kind!(K, $orole($($odims)*)): Clone,)*
        {
            fn clone(&self) -> Self {
                Self { $($r: self.$r.clone(),)* $($o: self.$o.clone(),)* }
            }
        }

        impl<K: $crate::kinds::Kind> std::fmt::Debug for $Tensors<K>
        where
            $($crate::kinds::declare::of_kind!(K, $rrole($($rdims)*)): std::fmt::Debug,)*
            $($crate::kinds::declare::of_kind!(K, $orole($($odims)*)): std::fmt::Debug,)*
        {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($Tensors))
                    $(.field(stringify!($r), &self.$r))*
                    $(.field(stringify!($o), &self.$o))*
                    .finish()
            }
        }

        impl<K: $crate::kinds::Kind> PartialEq for $Tensors<K>
        where
            $($crate::kinds::declare::of_kind!(K, $rrole($($rdims)*)): PartialEq,)*
            $($crate::kinds::declare::of_kind!(K, $orole($($odims)*)): PartialEq,)*
        {
            fn eq(&self, other: &Self) -> bool {
                $(self.$r == other.$r)&&* $(&& self.$o == other.$o)*
            }
        }

        $(#[$vdoc])*
        pub struct $Views<$a, T: $crate::Element, M: $crate::Memory = $crate::Host> {
            $(
                $(#[$rdoc])*
                #[doc = $crate::kinds::declare::shape_doc!($rrole($($rdims)*))]
                pub $r: $crate::kinds::declare::of_views!($a, T, M, $rrole($($rdims)*)),
            )*
            $(
                $(#[$odoc])*
                #[doc = $crate::kinds::declare::shape_doc!($orole($($odims)*))]
                pub $o: Option<$crate::kinds::declare::of_views!($a, T, M, $orole($($odims)*))>,
            )*
            $($(#[$sdoc])* pub $s: $setting,)*
        }

        impl<T: $crate::Element, M: $crate::Memory> Clone for $Views<'_, T, M> {
            fn clone(&self) -> Self {
                *self
            }
        }

        impl<T: $crate::Element, M: $crate::Memory> Copy for $Views<'_, T, M> {}

        impl<T: $crate::Element, M: $crate::Memory> std::fmt::Debug for $Views<'_, T, M> {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct(stringify!($Views))
                    $(.field(stringify!($r), &self.$r))*
                    $(.field(stringify!($o), &self.$o))*
                    $(.field(stringify!($s), &self.$s))*
                    .finish()
            }
        }

        impl<$a, T: $crate::Element, M: $crate::Memory> $Views<$a, T, M> {
            #[doc = concat!(
                "What every call has; all else is absent or plain. Add it with struct update syntax: `",
                stringify!($Views), " { …, ..", stringify!($Views), "::new(…) }`.",
            )]
            pub fn new($($r: $crate::kinds::declare::given!($a, T, M, $rrole($($rdims)*))),*) -> Self {
                Self {
                    $($r: $crate::kinds::declare::take!($r, $rrole),)*
                    $($o: None,)*
                    $($s: $default,)*
                }
            }

            /// The tensors with what is given beside them.
            #[allow(dead_code, reason = "only tensors of candle come as such")]
            pub(crate) fn of(tensors: $Tensors<$crate::kinds::Views<$a, T, M>>, $($s: $setting),*) -> Self {
                Self { $($r: tensors.$r,)* $($o: tensors.$o,)* $($s,)* }
            }

            pub(crate) fn tensors(&self) -> $Tensors<$crate::kinds::Views<$a, T, M>> {
                $Tensors { $($r: self.$r,)* $($o: self.$o,)* }
            }
        }

        $(#[$cdoc])*
        #[cfg(feature = "candle")]
        #[derive(Debug, Clone, Copy)]
        pub struct $Candle<$a> {
            $(
                $(#[$rdoc])*
                #[doc = $crate::kinds::declare::shape_doc!($rrole($($rdims)*))]
                pub $r: &$a candle_core::Tensor,
            )*
            $(
                $(#[$odoc])*
                #[doc = $crate::kinds::declare::shape_doc!($orole($($odims)*))]
                pub $o: Option<&$a candle_core::Tensor>,
            )*
            $($(#[$sdoc])* pub $s: $crate::kinds::declare::setting!($setting $(| $candle)?),)*
        }

        #[cfg(feature = "candle")]
        impl<$a> $Candle<$a> {
            #[doc = concat!(
                "The tensors that every call has; all else is absent or plain. Add it with struct update syntax: `",
                stringify!($Candle), " { …, ..", stringify!($Candle), "::new(…) }`.",
            )]
            pub fn new($($r: &$a candle_core::Tensor),*) -> Self {
                Self { $($r,)* $($o: None,)* $($s: $default,)* }
            }

            /// The operator over tensors that were kept for a backward pass.
            #[allow(dead_code, reason = "only what has gradients keeps tensors")]
            pub(crate) fn over(
                kept: &$a $Tensors<$crate::candle::tensors::CandleTensors>,
                $($s: $crate::kinds::declare::setting!($setting $(| $candle)?)),*
            ) -> Self {
                Self {
                    $($r: $crate::kinds::declare::to_candle!(&kept.$r, $rrole),)*
                    $($o: kept.$o.as_ref().map(|tensor| $crate::kinds::declare::to_candle!(tensor, $orole)),)*
                    $($s,)*
                }
            }

            pub(crate) fn tensors(&self) -> $Tensors<$crate::kinds::Ref<$a, $crate::candle::tensors::CandleTensors>> {
                $Tensors {
                    $($r: $crate::kinds::declare::of_candle!(self.$r, $rrole),)*
                    $($o: self.$o.map(|tensor| $crate::kinds::declare::of_candle!(tensor, $orole)),)*
                }
            }
        }
    };
}
pub(crate) use tensors;

/// The names of a tensor's dimensions, `(batch, length, d_inner)`.
macro_rules! dims {
    ($first:expr $(, $rest:expr)*) => {
        concat!("(", stringify!($first) $(, ", ", stringify!($rest))*, ")")
    };
}
pub(crate) use dims;

macro_rules! field {
    ($name:ident, projection($($varying:expr),*; $($constant:expr),*)) => {
        $crate::kinds::Field {
            constant_dims: $crate::kinds::declare::dims!($($constant),*),
            ..$crate::kinds::declare::field!($name, activation($($varying),*))
        }
    };
    ($name:ident, $role:ident($($dim:expr),*)) => {
        $crate::kinds::Field {
            name: stringify!($name),
            gradient: concat!("gradients.", stringify!($name)),
            dims: $crate::kinds::declare::dims!($($dim),*),
            constant_dims: "",
        }
    };
}
pub(crate) use field;

/// What the documentation of a tensor says of its shape.
macro_rules! shape_doc {
    (activation($($dim:expr),*)) => {
        concat!("\n\n`", $crate::kinds::declare::dims!($($dim),*), "` of `T`.")
    };
    (parameter($($dim:expr),*)) => {
        concat!("\n\n`", $crate::kinds::declare::dims!($($dim),*), "` of `f32`.")
    };
    (projection($($varying:expr),*; $($constant:expr),*)) => {
        concat!(
            "\n\n`", $crate::kinds::declare::dims!($($varying),*), "` of `T`, or `", $crate::kinds::declare::dims!($($constant),*),
            "` of `f32` if it is the same at every step.",
        )
    };
}
pub(crate) use shape_doc;

/// The type of a tensor of kind `K`.
macro_rules! of_kind {
    ($K:ident, projection($($dims:tt)*)) => { $crate::kinds::ProjectionAs<$K> };
    ($K:ident, activation($a:expr, $b:expr, $c:expr)) => { <$K as $crate::kinds::Kind>::Activation<3> };
    ($K:ident, activation($a:expr, $b:expr, $c:expr, $d:expr)) => { <$K as $crate::kinds::Kind>::Activation<4> };
    ($K:ident, parameter($a:expr)) => { <$K as $crate::kinds::Kind>::Parameter<1> };
    ($K:ident, parameter($a:expr, $b:expr)) => { <$K as $crate::kinds::Kind>::Parameter<2> };
    ($K:ident, parameter($a:expr, $b:expr, $c:expr)) => { <$K as $crate::kinds::Kind>::Parameter<3> };
}
pub(crate) use of_kind;

/// The type of a tensor as a view.
macro_rules! of_views {
    ($a:lifetime, $T:ident, $M:ident, projection($($dims:tt)*)) => { $crate::Projection<$a, $T, $M> };
    ($a:lifetime, $T:ident, $M:ident, activation($x:expr, $y:expr, $z:expr)) => { $crate::View<$a, $T, 3, $M> };
    ($a:lifetime, $T:ident, $M:ident, activation($w:expr, $x:expr, $y:expr, $z:expr)) => { $crate::View<$a, $T, 4, $M> };
    ($a:lifetime, $T:ident, $M:ident, parameter($x:expr)) => { $crate::View<$a, f32, 1, $M> };
    ($a:lifetime, $T:ident, $M:ident, parameter($x:expr, $y:expr)) => { $crate::View<$a, f32, 2, $M> };
    ($a:lifetime, $T:ident, $M:ident, parameter($x:expr, $y:expr, $z:expr)) => { $crate::View<$a, f32, 3, $M> };
}
pub(crate) use of_views;

/// The type of a view as an argument: of either a projection's.
macro_rules! given {
    ($a:lifetime, $T:ident, $M:ident, projection($($dims:tt)*)) => { impl Into<$crate::Projection<$a, $T, $M>> };
    ($a:lifetime, $T:ident, $M:ident, $role:ident($($dims:tt)*)) => {
        $crate::kinds::declare::of_views!($a, $T, $M, $role($($dims)*))
    };
}
pub(crate) use given;

/// The type of what is given beside candle's tensors.
#[cfg(feature = "candle")]
macro_rules! setting {
    ($setting:ty) => {
        $setting
    };
    ($setting:ty | $candle:ty) => {
        $candle
    };
}
#[cfg(feature = "candle")]
pub(crate) use setting;

macro_rules! take {
    ($tensor:expr, projection) => {
        $tensor.into()
    };
    ($tensor:expr, $role:ident) => {
        $tensor
    };
}
pub(crate) use take;

/// Calls a [`Map`] for a tensor.
macro_rules! apply {
    ($f:expr, $name:ident, $tensor:expr, $role:ident($($dims:tt)*)) => {
        $crate::kinds::declare::apply!(@ $f, $crate::kinds::declare::field!($name, $role($($dims)*)), $tensor, $role($($dims)*))?
    };
    (@ $f:expr, $field:expr, $tensor:expr, projection($($dims:tt)*)) => { $f.projection($field, $tensor) };
    (@ $f:expr, $field:expr, $tensor:expr, activation($x:expr, $y:expr, $z:expr)) => {
        $f.activation::<3>($field, $tensor)
    };
    (@ $f:expr, $field:expr, $tensor:expr, activation($w:expr, $x:expr, $y:expr, $z:expr)) => {
        $f.activation::<4>($field, $tensor)
    };
    (@ $f:expr, $field:expr, $tensor:expr, parameter($x:expr)) => { $f.parameter::<1>($field, $tensor) };
    (@ $f:expr, $field:expr, $tensor:expr, parameter($x:expr, $y:expr)) => { $f.parameter::<2>($field, $tensor) };
    (@ $f:expr, $field:expr, $tensor:expr, parameter($x:expr, $y:expr, $z:expr)) => {
        $f.parameter::<3>($field, $tensor)
    };
}
pub(crate) use apply;

/// Pairs a tensor with another.
macro_rules! pair_up {
    ($name:ident, $ours:expr, $theirs:expr, projection($($dims:tt)*)) => {
        $crate::kinds::pair_projections($crate::kinds::declare::field!($name, projection($($dims)*)), $ours, $theirs)?
    };
    ($name:ident, $ours:expr, $theirs:expr, $role:ident($($dims:tt)*)) => { ($ours, $theirs) };
}
pub(crate) use pair_up;

macro_rules! shaped {
    ($tensor:expr, projection($($varying:expr),*; $($constant:expr),*)) => {
        match $tensor {
            $crate::kinds::ProjectionOf::Varying(tensor) => {
                $crate::kinds::ProjectionOf::Varying((tensor, [$($varying),*]))
            }
            $crate::kinds::ProjectionOf::Constant(tensor) => {
                $crate::kinds::ProjectionOf::Constant((tensor, [$($constant),*]))
            }
        }
    };
    ($tensor:expr, $role:ident($($dim:expr),*)) => { ($tensor, [$($dim),*]) };
}
pub(crate) use shaped;

/// A reference to a tensor, or to the one in a projection.
macro_rules! by {
    ($by:ident, $tensor:expr, projection) => {
        ($tensor).$by()
    };
    ($by:ident, $tensor:expr, $role:ident) => {
        $tensor
    };
}
pub(crate) use by;

/// One of candle's tensors, which is a varying or a constant projection by its rank.
#[cfg(feature = "candle")]
macro_rules! of_candle {
    ($tensor:expr, projection) => {
        $crate::candle::tensors::projection($tensor)
    };
    ($tensor:expr, $role:ident) => {
        $tensor
    };
}
#[cfg(feature = "candle")]
pub(crate) use of_candle;

/// One of candle's tensors, whether it varies or is constant.
#[cfg(feature = "candle")]
macro_rules! to_candle {
    ($tensor:expr, projection) => {
        $tensor.either()
    };
    ($tensor:expr, $role:ident) => {
        $tensor
    };
}
#[cfg(feature = "candle")]
pub(crate) use to_candle;
