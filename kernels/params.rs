//! Reads the files `params.cuh`, which say what kernels take and how they are launched, and writes the same for Rust, so that
//! each struct and each number is written once.
//!
//! Such a file has namespaces, structs of plain data and integer constants, and nothing else:
//!
//! ```text
//! namespace scan {
//! using namespace common;
//! constexpr int STATE_VEC = 4, STATE_BLOCK = 4 * STATE_VEC;
//! struct Forward {
//!     Inputs inputs;
//!     float *final_state, *checkpoints;
//! };
//! }
//! ```
//!
//! A namespace becomes a module, a pointer a `u64`, an `int` constant a `usize`, and what is `alignas` is aligned in Rust too. The sizes of structs and the offsets of their
//! fields, as this file takes them to be, are asserted in both languages.

use std::collections::HashMap;
use std::fmt::Write;

/// The declarations of all files read so far.
#[derive(Default)]
pub struct Params {
    /// By their full names, `scan::forward::THREADS`.
    constants: HashMap<String, i64>,
    structs: HashMap<String, Layout>,
    rust: String,
    checks: String,
}

#[derive(Clone, Copy)]
struct Layout {
    size: usize,
    align: usize,
}

impl Params {
    /// Reads a file, which must come after those that it includes. An error says what was expected, in which line.
    pub fn read(&mut self, text: &str) -> Result<(), String> {
        let tokens = tokens(text);
        let mut parser = Parser { tokens: &tokens, at: 0, scope: Vec::new(), params: self };
        parser.declarations().map_err(|expected| {
            let (line, found) =
                tokens.get(parser.at).map_or((text.lines().count(), "the end"), |&(line, token)| (line, token));
            format!("line {line}: expected {expected}, got `{found}`")
        })
    }

    /// The modules for Rust.
    pub fn rust(&self) -> &str {
        &self.rust
    }

    /// Assertions for C++, of every struct and every constant, after the files have been included.
    pub fn checks(&self) -> &str {
        &self.checks
    }
}

/// Words, numbers, single characters and comments (`// …`), each with its line. What begins with `#` is left out.
fn tokens(text: &str) -> Vec<(usize, &str)> {
    let mut tokens = Vec::new();
    for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.starts_with('#')) {
        let mut rest = line.trim_start();
        while let Some(first) = rest.chars().next() {
            let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let len = if rest.starts_with("//") {
                rest.len()
            } else if is_word(first) {
                rest.find(|c| !is_word(c)).unwrap_or(rest.len())
            } else {
                first.len_utf8()
            };
            tokens.push((i + 1, &rest[..len]));
            rest = rest[len..].trim_start();
        }
    }
    tokens
}

/// What cannot be read gives what was expected in its place.
type Parsed<T> = Result<T, String>;

struct Parser<'a> {
    tokens: &'a [(usize, &'a str)],
    at: usize,
    /// The namespaces around, outermost first.
    scope: Vec<&'a str>,
    params: &'a mut Params,
}

/// A type as Rust has it, and its layout.
struct Type {
    rust: String,
    layout: Layout,
}

impl<'a> Parser<'a> {
    /// The next token, comments left out.
    fn peek(&mut self) -> &'a str {
        while self.tokens.get(self.at).is_some_and(|(_, token)| token.starts_with("//")) {
            self.at += 1;
        }
        self.tokens.get(self.at).map_or("", |&(_, token)| token)
    }

    fn accept(&mut self, wanted: &str) -> bool {
        let found = self.peek() == wanted;
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, wanted: &str) -> Parsed<()> {
        self.accept(wanted).then_some(()).ok_or_else(|| format!("`{wanted}`"))
    }

    fn word(&mut self, what: &str) -> Parsed<&'a str> {
        let word = self.peek();
        if !word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
            return Err(what.into());
        }
        self.at += 1;
        Ok(word)
    }

    /// The comments right above the next token, as documentation.
    fn docs(&mut self, indent: &str) -> String {
        let first = self.at;
        self.peek();
        let mut next = self.tokens.get(self.at).map_or(0, |&(line, _)| line);
        let mut docs = String::new();
        for &(line, comment) in self.tokens[first..self.at].iter().rev() {
            if line + 1 < next {
                break;
            }
            docs = format!("{indent}///{}\n{docs}", &comment[2..]);
            next = line;
        }
        docs
    }

    fn full(&self, name: &str) -> String {
        [&self.scope[..], &[name]].concat().join("::")
    }

    /// What `name` means here: in the namespaces around, the innermost first, or in `common`, which all files use.
    fn find<T: Copy>(&self, name: &str, of: impl Fn(&Params, &str) -> Option<T>) -> Option<(String, T)> {
        let around = (0..=self.scope.len()).rev().map(|depth| [&self.scope[..depth], &[name]].concat().join("::"));
        around.chain([format!("common::{name}")]).find_map(|full| of(self.params, &full).map(|found| (full, found)))
    }

    fn declarations(&mut self) -> Parsed<()> {
        loop {
            let indent = "    ".repeat(self.scope.len());
            let docs = self.docs(&indent);
            match self.peek() {
                "" if self.scope.is_empty() => return Ok(()),
                "" => return Err("`}`".into()),
                "}" if !self.scope.is_empty() => return Ok(()),
                "namespace" => {
                    self.at += 1;
                    let name = self.word("the namespace's name")?;
                    self.expect("{")?;
                    let _ = writeln!(self.params.rust, "{docs}{indent}pub mod {name} {{");
                    self.scope.push(name);
                    self.declarations()?;
                    self.scope.pop();
                    self.expect("}")?;
                    let _ = writeln!(self.params.rust, "{indent}}}");
                }
                "using" => {
                    for token in ["using", "namespace", "common", ";"] {
                        self.expect(token)?;
                    }
                }
                "constexpr" => self.constants(&docs, &indent)?,
                "struct" => self.structure(&docs, &indent)?,
                _ => return Err("`namespace`, `using namespace common;`, `constexpr` or `struct`".into()),
            }
        }
    }

    fn constants(&mut self, docs: &str, indent: &str) -> Parsed<()> {
        self.expect("constexpr")?;
        let rust = match self.peek() {
            "int" => "usize",
            "int64_t" => "i64",
            "uint64_t" => "u64",
            _ => return Err("`int`, `int64_t` or `uint64_t`".into()),
        };
        self.at += 1;
        loop {
            let name = self.word("the constant's name")?;
            self.expect("=")?;
            let value = self.sum()?;
            let full = self.full(name);
            let _ = writeln!(self.params.rust, "{docs}{indent}pub const {name}: {rust} = {value};");
            let _ = writeln!(self.params.checks, "static_assert({full} == {value}, \"{full}\");");
            self.params.constants.insert(full, value);
            if !self.accept(",") {
                return self.expect(";");
            }
        }
    }

    /// Products and quotients, added up; all of whole numbers, none negative.
    fn sum(&mut self) -> Parsed<i64> {
        let mut sum = self.product()?;
        loop {
            if self.accept("+") {
                sum += self.product()?;
            } else if self.accept("-") {
                sum -= self.product()?;
            } else {
                return Ok(sum);
            }
        }
    }

    fn product(&mut self) -> Parsed<i64> {
        let mut product = self.number()?;
        loop {
            if self.accept("*") {
                product *= self.number()?;
            } else if self.accept("/") {
                let by = self.number()?;
                product = product.checked_div(by).ok_or("a divisor other than zero")?;
            } else {
                return Ok(product);
            }
        }
    }

    fn number(&mut self) -> Parsed<i64> {
        if self.accept("(") {
            let inner = self.sum()?;
            self.expect(")")?;
            return Ok(inner);
        }
        if let Ok(number) = self.peek().parse() {
            self.at += 1;
            return Ok(number);
        }
        let first = self.at;
        let mut name = self.word("a number, a constant or `(`")?.to_string();
        while self.accept(":") {
            self.expect(":")?;
            name = format!("{name}::{}", self.word("a constant's name")?);
        }
        let known = self.find(&name, |params, full| params.constants.get(full).copied());
        known.map(|(_, value)| value).ok_or_else(|| {
            self.at = first;
            "a constant that is known here".into()
        })
    }

    fn structure(&mut self, docs: &str, indent: &str) -> Parsed<()> {
        self.expect("struct")?;
        let mut layout = Layout { size: 0, align: 1 };
        if self.accept("alignas") {
            self.expect("(")?;
            layout.align = usize::try_from(self.sum()?).map_err(|_| "an alignment")?;
            self.expect(")")?;
        }
        let name = self.word("the struct's name")?;
        self.expect("{")?;
        let full = self.full(name);
        let (mut fields, mut offsets) = (String::new(), Vec::new());
        // What C++ leaves out between fields is a field in Rust, so that all bytes of a struct are plain data.
        let gap = |fields: &mut String, from: usize, to: usize| {
            if from < to {
                let _ =
                    writeln!(fields, "{indent}    #[doc(hidden)]\n{indent}    pub gap_{from}: [u8; {}],", to - from);
            }
        };
        loop {
            let docs = self.docs(&format!("{indent}    "));
            if self.accept("}") {
                break;
            }
            self.accept("const");
            let kind = self.word("a field's type or `}`")?;
            fields += &docs;
            loop {
                let Type { rust, layout: field } = if self.accept("*") {
                    Type { rust: "u64".into(), layout: Layout { size: 8, align: 8 } }
                } else {
                    self.type_of(kind)?
                };
                let field_name = self.word("the field's name")?;
                let (rust, size) = if self.accept("[") {
                    let count = usize::try_from(self.sum()?).map_err(|_| "a count")?;
                    self.expect("]")?;
                    (format!("[{rust}; {count}]"), count * field.size)
                } else {
                    (rust, field.size)
                };
                let offset = layout.size.next_multiple_of(field.align);
                gap(&mut fields, layout.size, offset);
                let _ = writeln!(fields, "{indent}    pub {field_name}: {rust},");
                offsets.push((field_name, offset));
                layout = Layout { size: offset + size, align: layout.align.max(field.align) };
                if !self.accept(",") {
                    break;
                }
            }
            self.expect(";")?;
        }
        self.expect(";")?;
        let end = layout.size.next_multiple_of(layout.align);
        gap(&mut fields, layout.size, end);
        layout.size = end;
        self.write_struct(&full, docs, indent, &fields, &offsets, layout);
        self.params.structs.insert(full, layout);
        Ok(())
    }

    fn type_of(&self, name: &str) -> Parsed<Type> {
        let plain = |rust: &str, size| Ok(Type { rust: rust.into(), layout: Layout { size, align: size } });
        match name {
            "int32_t" => plain("i32", 4),
            "float" => plain("f32", 4),
            "int64_t" => plain("i64", 8),
            "uint64_t" => plain("u64", 8),
            "double" => plain("f64", 8),
            _ => {
                let found = self.find(name, |params, full| params.structs.get(full).copied());
                let (full, layout) =
                    found.ok_or("a pointer, a number of 32 or 64 bits, or a struct that is known here")?;
                // From the module that this one is in.
                let up = "super::".repeat(self.scope.len());
                Ok(Type { rust: format!("{up}{full}"), layout })
            }
        }
    }

    fn write_struct(
        &mut self,
        full: &str,
        docs: &str,
        indent: &str,
        fields: &str,
        offsets: &[(&str, usize)],
        layout: Layout,
    ) {
        let name = full.rsplit("::").next().unwrap_or(full);
        let Layout { size, align } = layout;
        let (rust, checks) = (&mut self.params.rust, &mut self.params.checks);
        let derive = "#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]";
        // More than that of numbers has been asked for, of the struct or of what it holds.
        let repr = if align > 8 { format!("C, align({align})") } else { "C".into() };
        let _ = writeln!(
            rust,
            "{docs}{indent}{derive}\n{indent}#[repr({repr})]\n{indent}pub struct {name} {{\n{fields}{indent}}}"
        );
        let _ = writeln!(
            rust,
            "{indent}const _: () = assert!(size_of::<{name}>() == {size} && align_of::<{name}>() == {align});"
        );
        let _ = writeln!(checks, "static_assert(sizeof({full}) == {size} && alignof({full}) == {align}, \"{full}\");");
        for (field, offset) in offsets {
            let _ = writeln!(rust, "{indent}const _: () = assert!(std::mem::offset_of!({name}, {field}) == {offset});");
            let _ = writeln!(checks, "static_assert(offsetof({full}, {field}) == {offset}, \"{full}::{field}\");");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Params;

    const COMMON: &str = "namespace common {\nconstexpr int FOUR = 2 * (1 + 1);\nstruct Place {\n    const void *at;\n    int64_t \
                          step;\n};\n}\n";

    fn read(text: &str) -> Result<Params, String> {
        let mut params = Params::default();
        params.read(COMMON)?;
        params.read(text)?;
        Ok(params)
    }

    #[test]
    fn what_rust_gets() {
        let text = "#pragma once\n// Not documentation.\n\nnamespace scan {\nusing namespace common;\n// Doc.\nstruct Few {\n    \
                    // Of u.\n    Place u, z;\n    float *x, *y;\n    int32_t few[FOUR * 2];\n    double d;\n    float f, g;\n};\nnamespace forward {\nconstexpr int A = \
                    FOUR, B = A * 3 - 2 / 2;\n}\nconstexpr uint64_t FLAG = forward::B;\n}\n";
        let params = read(text).expect("it can be read");
        let expected = [
            "    /// Doc.\n",
            "        /// Of u.\n        pub u: super::common::Place,\n        pub z: super::common::Place,\n",
            "        pub y: u64,\n        pub few: [i32; 8],\n",
            "        pub d: f64,\n        pub f: f32,\n        pub g: f32,\n",
            "size_of::<Few>() == 96 && align_of::<Few>() == 8",
            "offset_of!(Few, few) == 48",
            "    pub mod forward {\n        pub const A: usize = 4;\n        pub const B: usize = 11;\n    }\n",
            "    pub const FLAG: u64 = 11;\n",
        ];
        for part in expected {
            assert!(params.rust().contains(part), "{part} in\n{}", params.rust());
        }
        assert!(!params.rust().contains("Not documentation"));
        for part in ["offsetof(scan::Few, z) == 16", "static_assert(scan::forward::B == 11"] {
            assert!(params.checks().contains(part), "{part} in\n{}", params.checks());
        }
    }

    /// What lies between fields and after them is a field of bytes.
    #[test]
    fn aligned_structs_have_no_holes() {
        let text =
            "struct alignas(64) Map {\n    uint64_t words[2];\n};\nstruct Two {\n    float x;\n    Map map;\n};\n";
        let params = read(text).expect("it can be read");
        for part in [
            "#[repr(C, align(64))]\npub struct Map {\n    pub words: [u64; 2],\n    #[doc(hidden)]\n    pub gap_16: [u8; 48],\n}",
            "    #[doc(hidden)]\n    pub gap_4: [u8; 60],\n    pub map: Map,\n",
            "size_of::<Two>() == 128 && align_of::<Two>() == 64",
        ] {
            assert!(params.rust().contains(part), "{part} in\n{}", params.rust());
        }
    }

    /// What is not plain data is named, and never left out.
    #[test]
    fn what_cannot_be_read() {
        for (text, error) in [
            ("namespace a {\nstruct S {\n    bool x;\n};\n}", "line 3: expected a pointer, a number of 32 or 64 bits"),
            ("struct S {\n    int64_t x : 3;\n};", "line 2: expected `;`, got `:`"),
            ("struct S {\n    int64_t x() const;\n};", "line 2: expected `;`, got `(`"),
            ("constexpr int A = B;", "line 1: expected a constant that is known here"),
            ("constexpr float A = 1;", "line 1: expected `int`, `int64_t` or `uint64_t`, got `float`"),
            ("namespace a {", "line 1: expected `}`, got `the end`"),
            ("enum A { B };", "line 1: expected `namespace`"),
        ] {
            let got = read(text).err().unwrap_or_default();
            assert!(got.starts_with(error), "{text}: {got}");
        }
    }
}
