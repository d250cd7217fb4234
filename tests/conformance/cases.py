"""One graph or more for each operation, written for any element type ({F}): what the conformance suite runs.

Shapes have a symbolic dim, odd sizes and broadcasting; a case is named `op` or `op-variant`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

DIMS = "dim B in 1..2..8 dim S in 1..5..64"


@dataclass(frozen=True)
class Case:
    """A graph over element type {F}, {BITS} being three of its values; `ranges` bounds random values by name."""

    name: str
    inputs: str
    body: str
    result: str
    dims: str = DIMS
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def op(self) -> str:
        return self.name.partition("-")[0]

    def text(self, dtype: str) -> str:
        """The IR of this case with its result as output `y`."""
        body = f"graph case({self.inputs}) {{ {self.dims} {self.body} return y = %{self.result} }}"
        bits = "(true, false, true)" if dtype == "bool" else "(1, 0, 1)"
        return body.replace("{F}", dtype).replace("{BITS}", bits)


def _binary(op: str, **ranges: tuple[float, float]) -> list[Case]:
    return [
        Case(op, "%a: {F}[B,S,6], %b: {F}[B,S,6]", f"%y: {{F}}[B,S,6] = {op}(%a, %b)", "y", ranges=ranges),
        Case(
            f"{op}-broadcast", "%a: {F}[B,S,6], %b: {F}[B,1,6]", f"%y: {{F}}[B,S,6] = {op}(%b, %a)", "y", ranges=ranges
        ),
        Case(f"{op}-literal", "%a: {F}[B,S,6]", f"%y: {{F}}[B,S,6] = {op}(%a, 3)", "y", ranges=ranges),
    ]


def _unary(op: str, low: float = -4.0, high: float = 4.0, attrs: str = "") -> Case:
    return Case(op, "%x: {F}[B,S,6]", f"%y: {{F}}[B,S,6] = {op}(%x){attrs}", "y", ranges={"x": (low, high)})


def _optional(variant: str, heads: int) -> tuple[str, str]:
    """Operands behind the positions of an attention, and the inputs that they are."""
    operands, inputs = "", ""
    if "prefix" in variant or "sinks" in variant:
        operands += ", %prefix" if "prefix" in variant else ", _"
        inputs += ", %prefix: i32[B]" if "prefix" in variant else ""
    if "sinks" in variant:
        operands += ", %sinks"
        inputs += f", %sinks: {{F}}[{heads}]"
    return operands, inputs


def _attention(variant: str, attrs: str, heads: int = 4, groups: int = 2, dim: int = 16, wide: int = 16) -> Case:
    operands, extra = _optional(variant, heads)
    shapes = f"%q: {{F}}[B,S,{heads},{dim}], %k: {{F}}[B,S,{groups},{dim}], %v: {{F}}[B,S,{groups},{wide}]"
    return Case(
        f"attention-{variant}",
        f"{shapes}, %positions: i32[B,S]{extra}",
        f"%y: {{F}}[B,S,{heads},{wide}] = attention(%q, %k, %v, %positions{operands}) {{{attrs}}}",
        "y",
        ranges={"prefix": (2, 3)},
    )


def _cached(variant: str, attrs: str, heads: int = 4, groups: int = 2, wide: int = 16) -> Case:
    """Attention over a linear cache that is an input, all of it written: 5 places before the tokens, 5 of them."""
    operands, extra = _optional(variant, heads)
    shapes = f"%q: {{F}}[B,S,{heads},16], %k: {{F}}[B,{groups},11,16], %v: {{F}}[B,{groups},11,{wide}]"
    return Case(
        f"cached_attention-{variant}",
        f"{shapes}, %at: i32[B,S]{extra}",
        f"%y: {{F}}[B,S,{heads},{wide}] = cached_attention(%q, %k, %v, %at{operands}) {{{attrs}}}",
        "y",
        ranges={"prefix": (2, 3), "at": (4, 9)},
    )


SLOPES = "slopes = (0.5, 0.25, 0.125, 0.0625)"
_NORM = "%x: {F}[B,S,48]"


def _stored(variant: str, scale: str, of: str, zero: str = "", outer: bool = False, attrs: str = "") -> Case:
    """A product with a weight of {F}[8,64] that is dequantized: codes, scale, zero, a scale of the whole."""
    weights = f'%c: {{F}}[8,64] = weight() {{name = "c"}} %s: {of}{scale} = weight() {{name = "s"}} '
    weights += f'%z: {zero} = weight() {{name = "z"}} ' if zero else ""
    weights += '%o: f32[1] = weight() {name = "o"} ' if outer else ""
    operands = "%c, %s" + (", %z" if zero else ", _" if outer else "") + (", %o" if outer else "")
    return Case(
        f"dequantize-{variant}", "%x: f32[B,S,64]",
        f'{weights}%w: f32[8,64] = dequantize({operands}) {{dtype = "f32"{attrs}}} '
        "%y: f32[B,S,8] = matmul(%x, %w) {transpose_b = true}", "y",
    )  # fmt: skip


def _rounded(to: str, attrs: str = "", scale: str = "[B,S,1]", kind: str = "f32", of: str = "") -> Case:
    """Quantized by the scales of its rows, and back."""
    block = f", block = (1, {of})" if of else ""
    return Case(
        f"quantize-{to}-{kind}{'-blocks' if of else ''}", "%x: {F}[B,S,64]",
        f'%s: {kind}{scale} = row_scale(%x) {{dtype = "{to}"{attrs}}} '
        f'%q: {to}[B,S,64] = quantize(%x, %s) {{dtype = "{to}"{block}}} '
        f'%y: f32[B,S,64] = dequantize(%q, %s) {{dtype = "f32"{block}}}', "y", dims="dim B in 1..2..8 dim S in 1..5..64"
    )  # fmt: skip


CASES: tuple[Case, ...] = (
    *_binary("add"),
    *_binary("sub"),
    *_binary("mul", a=(-30.0, 30.0), b=(-30.0, 30.0)),
    *_binary("div", a=(1.0, 4.0), b=(1.0, 4.0)),
    *_binary("maximum"),
    *_binary("minimum"),
    *(
        Case(f"compare-{kind}", "%a: {F}[B,S,6], %b: {F}[B,1,6]",
             f'%y: bool[B,S,6] = compare(%a, %b) {{kind = "{kind}"}}', "y", ranges={"a": (-2, 2), "b": (-2, 2)})
        for kind in ("lt", "le", "gt", "ge", "eq", "ne")
    ),
    Case("and", "%a: {F}[B,S,6], %b: {F}[B,1,6]", "%y: {F}[B,S,6] = and(%a, %b)", "y"),
    Case("or", "%a: {F}[B,S,6], %b: {F}[B,1,6]", "%y: {F}[B,S,6] = or(%a, %b)", "y"),
    Case("where", "%c: bool[B,S,1], %a: {F}[B,S,6], %b: {F}[6]", "%y: {F}[B,S,6] = where(%c, %a, %b)", "y"),
    _unary("exp"),
    _unary("rsqrt", 0.01, 4.0),
    _unary("cos", -30.0, 30.0),
    _unary("sin", -30.0, 30.0),
    _unary("tanh"),
    _unary("erf"),
    _unary("sigmoid", -9.0, 9.0),
    _unary("relu"),
    _unary("silu", -9.0, 9.0),
    Case("gelu-erf", "%x: {F}[B,S,6]", "%y: {F}[B,S,6] = gelu(%x) {approximate = false}", "y"),
    Case("gelu-tanh", "%x: {F}[B,S,6]", "%y: {F}[B,S,6] = gelu(%x) {approximate = true}", "y"),
    *(
        Case(f"cast-{to}", "%x: {F}[B,S,6]", f'%y: {to}[B,S,6] = cast(%x) {{dtype = "{to}"}}', "y",
             ranges={"x": (0, 4)})
        for to in ("f32", "bf16", "i32", "bool")
    ),
    Case("matmul", "%a: {F}[B,S,24], %b: {F}[B,24,7]", "%y: {F}[B,S,7] = matmul(%a, %b)", "y"),
    Case("matmul-transposed", "%a: {F}[B,S,24]",
         '%w: {F}[7,24] = weight() {name = "w"} %y: {F}[B,S,7] = matmul(%a, %w) {transpose_b = true}', "y"),
    Case("matmul-broadcast", "%a: {F}[B,3,S,24], %b: {F}[B,1,7,24]",
         "%y: {F}[B,3,S,7] = matmul(%a, %b) {transpose_b = true}", "y"),
    Case("gather", "%i: i32[B,S]", '%w: {F}[11,6] = weight() {name = "w"} %y: {F}[B,S,6] = gather(%w, %i)', "y",
         ranges={"i": (0, 10)}),
    Case("gather-rows", "%x: {F}[S,6], %i: i32[B]", "%y: {F}[B,6] = gather(%x, %i)", "y", ranges={"i": (0, 4)}),
    Case("gather-padded", "%x: {F}[B,S,6], %i: i32[B]", "%y: {F}[B,6] = gather(%x, %i) {dims = 2}", "y",
         ranges={"i": (0, 14)}),
    Case("mean", "%x: {F}[B,S,48]", "%y: {F}[B,S,1] = mean(%x)", "y"),
    Case("sum", "%x: {F}[B,S,48]", "%y: {F}[B,S,1] = sum(%x)", "y"),
    Case("softmax", "%x: {F}[B,S,48]", "%y: {F}[B,S,48] = softmax(%x)", "y"),
    Case("softmax-sink", "%x: {F}[B,S,48], %s: {F}[S,1]", "%y: {F}[B,S,48] = softmax(%x, %s)", "y"),
    Case("top_k", "%x: {F}[B,S,7]", "%y: i32[B,S,3] = top_k(%x) {k = 3}", "y"),
    Case("top_k-equals", "%x: {F}[B,S,9]",
         "%z: {F}[B,S,9] = mul(%x, 0) %y: i32[B,S,9] = top_k(%z) {k = 9}", "y"),
    Case("take", "%x: {F}[B,S,7], %i: i32[B,S,3]", "%y: {F}[B,S,3] = take(%x, %i)", "y", ranges={"i": (0, 6)}),
    Case("gather_matmul", "%x: {F}[B,S,1,24], %i: i32[B,S,3]",
         '%w: {F}[5,7,24] = weight() {name = "w"} %y: {F}[B,S,3,7] = gather_matmul(%x, %w, %i)', "y",
         ranges={"i": (1, 3)}),  # some matrices are chosen by none
    Case("gather_matmul-rows", "%x: {F}[S,2,24], %i: i32[S,2]",
         '%w: {F}[5,7,24] = weight() {name = "w"} %y: {F}[S,2,7] = gather_matmul(%x, %w, %i)', "y",
         ranges={"i": (0, 4)}),
    Case("gather_matmul-input", "%x: {F}[S,1,24], %w: {F}[3,7,24], %i: i32[S,2]",
         "%y: {F}[S,2,7] = gather_matmul(%x, %w, %i)", "y", ranges={"i": (0, 2)}),
    Case("reshape-split", "%x: {F}[B,S,12]", '%y: {F}[B,S,3,4] = reshape(%x) {shape = ("B", "S", 3, 4)}', "y"),
    Case("reshape-merge", "%x: {F}[B,3,S,4]", '%y: {F}[3,B,S,4] = reshape(%x) {shape = (3, "B", "S", 4)}', "y"),
    Case("transpose", "%x: {F}[B,S,3,4]", "%y: {F}[B,3,S,4] = transpose(%x) {axes = (-2, -3, -1)}", "y"),
    Case("concat", "%a: {F}[B,S,3], %b: {F}[B,S,5]", "%y: {F}[B,S,8] = concat(%a, %b) {axis = -1}", "y"),
    Case("concat-weights", "%a: {F}[B,S,8]",
         '%v: {F}[3,8] = weight() {name = "v"} %w: {F}[2,8] = weight() {name = "w"} '
         "%j: {F}[5,8] = concat(%v, %w) {axis = -2} %p: {F}[8,5] = transpose(%j) {axes = (-1, -2)} "
         "%s: {F}[8,4] = slice(%p) {axis = -1, start = 1, stop = 5} %r: {F}[4,8] = reshape(%s) {shape = (4, 8)} "
         "%t: {F}[1,8] = slice(%r) {axis = -2, start = 2, stop = 3} %y: {F}[B,S,8] = maximum(%a, %t)", "y"),
    Case("slice-first", "%x: {F}[B,S,9]", "%y: {F}[B,1,9] = slice(%x) {axis = -2, start = 0, stop = 1}", "y"),
    Case("slice", "%x: {F}[B,S,9]", "%y: {F}[B,S,4] = slice(%x) {axis = -1, start = 3, stop = 7}", "y"),
    Case("rms_norm", _NORM,
         '%w: {F}[48] = weight() {name = "w"} %y: {F}[B,S,48] = rms_norm(%x, %w) {eps = 1e-05}', "y"),
    Case("layer_norm", _NORM,
         '%w: {F}[48] = weight() {name = "w"} %b: {F}[48] = weight() {name = "b"} '
         "%y: {F}[B,S,48] = layer_norm(%x, %w, %b) {eps = 1e-05}", "y"),
    Case("layer_norm-plain", _NORM, "%y: {F}[B,S,48] = layer_norm(%x) {eps = 1e-05}", "y"),
    Case("layer_norm-no-bias", _NORM,
         '%w: {F}[48] = weight() {name = "w"} %y: {F}[B,S,48] = layer_norm(%x, %w) {eps = 1e-12}', "y"),
    *(
        Case(f"rotate-{style}-{half}", f"%x: {{F}}[B,S,3,16], %cos: f32[B,S,{half}], %sin: f32[B,S,{half}]",
             f'%y: {{F}}[B,S,3,16] = rotate(%x, %cos, %sin) {{style = "{style}"}}', "y")
        for style in ("half", "interleaved") for half in (8, 3)
    ),
    Case("rotate-packed", "%x: {F}[S,3,16], %cos: f32[S,8], %sin: f32[S,8]",
         '%y: {F}[S,3,16] = rotate(%x, %cos, %sin) {style = "half"}', "y"),
    _attention("full", "scale = 0.25, causal = false"),
    _attention("full-one-key-head-each", "scale = 0.25, causal = false", groups=4, wide=8),
    _attention("prefix-one-key-head-each", "scale = 0.25, causal = true, window = 3", groups=4),
    _attention("causal", "scale = 0.25, causal = true", groups=4),
    _attention("window", "scale = 0.25, causal = true, window = 3", groups=1),
    _attention("two-sided-window", "scale = 0.25, causal = false, window = 3"),
    _attention("prefix", "scale = 0.25, causal = true"),
    _attention("softcap", "scale = 0.25, causal = true, softcap = 2.0"),
    _attention("slopes", f"scale = 0.25, causal = true, {SLOPES}"),
    _attention("sinks", "scale = 0.25, causal = true"),
    _attention("prefix-sinks", f"scale = 0.5, causal = true, window = 4, softcap = 3.0, {SLOPES}", wide=8),
    Case("update_cache", "%c: {F}[B,2,11,16], %x: {F}[B,S,2,16], %past: i32[B]",
         "%y: {F}[B,2,11,16] = update_cache(%c, %x, %past)", "y", ranges={"past": (0, 5)}),
    _cached("causal", "scale = 0.25", groups=4),
    _cached("odd-scale", "scale = 0.3"),
    _cached("window", "scale = 0.25, window = 3", groups=1),
    _cached("prefix", "scale = 0.25, window = 4"),
    _cached("softcap", "scale = 0.25, softcap = 2.0"),
    _cached("slopes", f"scale = 0.25, {SLOPES}"),
    _cached("sinks", "scale = 0.25, window = 3"),
    _cached("sinks-slopes", f"scale = 0.25, {SLOPES}"),
    _cached("narrow", "scale = 0.25", wide=8),
    _cached("prefix-sinks", f"scale = 0.5, window = 4, softcap = 3.0, {SLOPES}", groups=4, wide=8),
    _stored("rows", "[8,1]", "f32"),
    _stored("whole", "[1]", "f16"),
    _stored("groups", "[8,4]", "f16", attrs=", block = (1, 16)"),
    _stored("whole-rows", "[8,1]", "f16", attrs=", block = (1, 64)"),
    _stored("zeros", "[8,2]", "f32", zero="u4[8,2]", attrs=", block = (1, 32)"),
    _stored("byte-zeros", "[8,2]", "f32", zero="u8[8,2]", attrs=", block = (1, 32)"),
    _stored("squares", "[2,4]", "f32", attrs=", block = (4, 16)"),
    _stored("ragged", "[3,2]", "f32", attrs=", block = (3, 48)"),
    _stored("powers", "[8,2]", "f8e8m0", attrs=", block = (1, 32)"),
    _stored("outer", "[8,4]", "f8e4m3", outer=True, attrs=", block = (1, 16)"),
    _rounded("i8"),
    _rounded("f8e4m3"),
    _rounded("f4e2m1"),
    _rounded("i8", ", block = 16", "[B,S,4]", of="16"),
    _rounded("f8e4m3", ', scale = "f8e8m0", block = 32', "[B,S,2]", "f8e8m0", "32"),
    _rounded("f4e2m1", ', scale = "f8e8m0", block = 32', "[B,S,2]", "f8e8m0", "32"),
    Case("quantize-zero", "%x: {F}[B,S,64]",
         '%s: f32[1] = const() {value = (0.125)} %z: u8[1] = const() {value = (7)} '
         '%q: u8[B,S,64] = quantize(%x, %s, %z) {dtype = "u8"} '
         '%y: f32[B,S,64] = dequantize(%q, %s, %z) {dtype = "f32"}', "y"),
    *(
        Case(f"row_scale-{name}", "%x: {F}[B,S,64]", f'%y: f32[B,S,{count}] = row_scale(%x) {{dtype = "i8"{block}}}',
             "y")
        for name, count, block in (("row", 1, ""), ("blocks", 4, ", block = 16"))
    ),
    Case("weight", "%x: {F}[B,S,6]", '%w: {F}[6] = weight() {name = "w"} %y: {F}[B,S,6] = maximum(%x, %w)', "y"),
    Case("weight-used-raw", "%x: {F}[B,S,6], %c: bool[B,S,1]",
         '%w: {F}[6] = weight() {name = "w"} %y: {F}[B,S,6] = where(%c, %x, %w)', "y"),
    Case("const", "%x: {F}[B,S,3], %c: bool[B,S,1]",
         "%w: {F}[3] = const() {value = {BITS}} %y: {F}[B,S,3] = where(%c, %x, %w)", "y"),
    Case("repeat", "%x: {F}[B,S,6], %c: bool[B,S,6]",
         "%y: {F}[B,S,6] = repeat(%x) {count = 3} (%i: {F}[B,S,6]) => { "
         '%w: {F}[6] = weight() {name = "l.{i}.w"} %v: {F}[6] = weight() {name = "l.{2*i+1}.v"} '
         "%n: {F}[B,S,6] = where(%c, %i, %w) %o: {F}[B,S,6] = where(%c, %v, %n) yield %o }", "y"),
)  # fmt: skip
