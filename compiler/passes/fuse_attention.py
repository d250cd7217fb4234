"""Recognises attention in its plain equations: one pattern for MHA, GQA and MQA, masks by what they compute.

Scale, soft cap and linear biases are optional lines of the pattern; the mask is read conjunct by conjunct. What is not
recognised stays as it is, with the reason.
"""

from __future__ import annotations

from itertools import product

from compiler.ir.core import AttrValue, Equation, Value
from compiler.ir.types import Shape
from compiler.passes.pattern import Match, show
from compiler.passes.rewrite import Rule, rewrite
from compiler.passes.runner import Pass

# A masked score: the lowest float32, as the operation has it. -inf would differ in rows that see no key.
LOWEST = -3.4028234663852886e38

_HEAD = """
    %q5 = reshape(%q4)
    %qt = transpose(%q5) {axes = (-3, -2, -4, -1)}
    %k5 = reshape(%k4)
    %kt = transpose(%k5) {axes = (-3, -2, -4, -1)}
    %v5 = reshape(%v4)
    %vt = transpose(%v5) {axes = (-3, -2, -4, -1)}
    %s0 = matmul(%qt, %kt) {transpose_b = true}
"""
_SCALE = ("%s1 = mul(%s0, $scale)", "%s1 = div(%s0, $divisor)", "")
_SOFTCAP = ("", "%d = div(%s1, $cap)\n    %t = tanh(%d)\n    %s2 = mul(%t, $cap)")
_BIAS = ("", "%s3 = add({scores}, %bias)")
_SINKS = ("%p = softmax(%m)", "%sink = reshape(%sinks)\n    %p = softmax(%m, %sink)")
_TAIL = """
    %m = where(%mask, {scores}, $low)
    {softmax}
    %o = matmul(%p, %vt)
    %ot = transpose(%o) {{axes = (-2, -4, -3, -1)}}
    %y = reshape(%ot) {{shape = $shape}}
"""


def _before() -> tuple[str, ...]:
    texts = []
    for scale, softcap, bias, softmax in product(_SCALE, _SOFTCAP, _BIAS, _SINKS):
        scores = "%s1" if scale else "%s0"
        lines = [_HEAD, scale, softcap.replace("%s1", scores)]
        scores = "%s2" if softcap else scores
        lines.append(bias.format(scores=scores))
        lines.append(_TAIL.format(scores="%s3" if bias else scores, softmax=softmax))
        texts.append("\n".join(lines))
    for scale in _SCALE[:2]:  # the bias added before the scale
        biased = "%sb = add(%s0, %inner_bias)\n" + scale.replace("%s0", "%sb")
        texts.append("\n".join((_HEAD, biased, _TAIL.format(scores="%s1", softmax=_SINKS[0]))))
    # A longer text first: `add` before softmax is a bias, not a part of something else.
    return tuple(sorted(texts, key=len, reverse=True))


# -- masks: what a conjunct may be, and what it says ----------------------------------------------------------------

_VALID = ('%c = compare(%pk, 0) {kind = "ge"}', '%c = compare(%pk, -1) {kind = "gt"}')
_CAUSAL = '%c = compare(%pk, %pq) {kind = "le"}'
_BEFORE = '%c = compare(%pk, %prefix5) {kind = "lt"}'
_WINDOW = '%gap = sub(%pq, %pk)\n%c = compare(%gap, $window) {kind = "lt"}'
_AND = "%c = and(%a, %b)"
_OR = "%c = or(%a, %b)"
_RESHAPE = "%c = reshape(%x)"
_ALIBI = """
    %slopes = const() {value = $slopes}
    %pkf = cast(%pk) {dtype = "f32"}
    %c = mul(%slopes, %pkf)
"""
_ALIBI_BF16 = """
    %slopes = const() {value = $slopes}
    %pkf = cast(%pk) {dtype = "f32"}
    %a = cast(%slopes) {dtype = "bf16"}
    %b = cast(%pkf) {dtype = "bf16"}
    %m = mul(%a, %b)
    %c = cast(%m) {dtype = "f32"}
"""


class _Masks:
    """Reads a mask into the options of `attention`; `reason` says what it could not read."""

    def __init__(self, match: Match) -> None:
        self.match = match
        batch, length = match.type("q4").shape[:2]
        self.query_shape: Shape = (batch, 1, 1, length, 1)
        self.key_shape: Shape = (batch, 1, 1, 1, length)
        self.prefix_shape: Shape = (batch, 1, 1, 1, 1)
        self.positions: Value | None = None
        self.prefix: Value | None = None
        self.valid = self.causal = False
        self.window: AttrValue = None

    def read(self) -> str | None:
        for value in self.conjuncts(self.match.value("mask")):
            if not self.conjunct(value):
                return f"the mask's {self.text(value)} is neither valid, causal, prefix nor window"
        if not self.valid:
            return "the mask lets padding be seen: it lacks `position of the key >= 0`"
        return None

    def text(self, value: Value) -> str:
        equation = self.match.scope.definition(value)
        return f"`%{value.name}`" if equation is None else show(equation)

    def conjuncts(self, value: Value) -> list[Value]:
        both = self.match.find(_AND, value)
        return [value] if both is None else self.conjuncts(both.value("a")) + self.conjuncts(both.value("b"))

    def conjunct(self, value: Value) -> bool:
        for text in _VALID:
            valid = self.match.find(text, value)
            if valid is not None and self.keys(valid.value("pk")):
                self.valid = True
                return True
        window = self.match.find(_WINDOW, value)
        if window is not None and isinstance(window.holes["window"], int) and self.window is None:
            self.window = window.holes["window"]
            return self.queries(window.value("pq")) and self.keys(window.value("pk"))
        if self.is_causal(value):
            self.causal = True
            return True
        either = self.match.find(_OR, value)
        if either is None or self.causal:
            return False
        for left, right in (("a", "b"), ("b", "a")):
            if self.is_causal(either.value(left)) and self.is_prefix(either.value(right)):
                self.causal = True
                return True
        return False

    def is_causal(self, value: Value) -> bool:
        found = self.match.find(_CAUSAL, value)
        return found is not None and self.queries(found.value("pq")) and self.keys(found.value("pk"))

    def is_prefix(self, value: Value) -> bool:
        found = self.match.find(_BEFORE, value)
        if found is None or not self.keys(found.value("pk")):
            return False
        view = self.match.find(_RESHAPE, found.values["prefix5"])
        if view is None or view.type("c").shape != self.prefix_shape or view.type("x").rank != 1:
            return False
        self.prefix = view.value("x")
        return True

    def queries(self, value: Value) -> bool:
        return self.view_of_positions(value, self.query_shape)

    def keys(self, value: Value) -> bool:
        return self.view_of_positions(value, self.key_shape)

    def view_of_positions(self, value: Value, shape: Shape) -> bool:
        view = self.match.find(_RESHAPE, value)
        if view is None or view.type("c").shape != shape or view.type("x").rank != 2:
            return False
        if self.positions is None:
            self.positions = view.value("x")
        return self.positions == view.value("x")


# -- the rule -------------------------------------------------------------------------------------------------------


def _refuse(match: Match) -> str | None:
    holes = match.holes
    reason = _heads(match)
    if reason is not None:
        return reason
    if holes["low"] != LOWEST:
        return f"masked scores become {holes['low']}, not the lowest float32"
    masks = _Masks(match)
    reason = masks.read()
    if reason is not None:
        return reason
    divisor = holes.get("divisor")
    if isinstance(divisor, (int, float)):
        holes["scale"] = 1.0 / divisor
    scale = holes.setdefault("scale", 1.0)
    holes.setdefault("cap", None)
    holes["causal"], holes["window"], holes["slopes"], holes["bf16"] = masks.causal, masks.window, None, None
    match.values["positions"], match.values["prefix"] = masks.positions, masks.prefix
    if "sinks" not in match.values:
        match.values["sinks"] = None
    elif match.type("sinks").rank != 1 or match.type("sink").shape != (*match.type("q5").shape[2:4], 1, 1):
        return f"%{match.value('sink').name} is {match.type('sink')}, not one logit for each head [K,H/K,1,1]"
    for name, factor in (("bias", 1.0), ("inner_bias", scale)):
        if name in match.values:
            assert isinstance(factor, (int, float))  # an operand of mul or div
            return _read_slopes(match, masks, name, factor)
    return None


def _read_slopes(match: Match, masks: _Masks, name: str, factor: float) -> str | None:
    """Read what is added to the scores as ALiBi's slopes, times `factor`."""
    alibi, bf16 = match.find(_ALIBI, match.value(name)), match.find(_ALIBI_BF16, match.value(name))
    if bf16 is not None:
        alibi, match.holes["bf16"], factor = bf16, factor, 1.0
    if alibi is None or not masks.keys(alibi.value("pk")):
        return f"the scores' bias {masks.text(match.value(name))} is no constant slope times the key's position"
    shape = alibi.type("slopes").static_shape()
    if shape != (1, *match.type("q5").shape[2:4], 1, 1):
        return f"the slopes are {alibi.type('slopes')}, not one for each head [1,K,H/K,1,1]"
    match.holes["slopes"] = tuple(slope * factor for slope in _flatten(alibi.holes["slopes"]))
    return None


def _heads(match: Match) -> str | None:
    """Check that [B,S,H,D] is viewed as [B,S,K,H/K,D], and keys and values as [B,S,K,1,D]."""
    for name in ("q4", "k4", "v4"):
        if match.type(name).rank != 4:
            return f"%{match.value(name).name} is {match.type(name)}, not [B,S,heads,D]"
    batch, length, heads, _ = match.type("q4").shape
    for name, view in (("k4", "k5"), ("v4", "v5")):
        *_, groups, dim = match.type(name).shape
        if match.type(view).shape != (batch, length, groups, 1, dim):
            return f"%{match.value(view).name} is {match.type(view)}, not {match.type(name)} with one query group"
    groups = match.type("k5").shape[2]
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % groups:
        return f"{heads} query heads do not share {groups} key heads evenly"
    if match.type("q5").shape[2:4] != (groups, heads // groups):
        return f"%{match.value('q5').name} is {match.type('q5')}: query heads are not grouped as [K, H/K]"
    return None


def _flatten(value: AttrValue) -> list[float]:
    if isinstance(value, tuple):
        return [leaf for item in value for leaf in _flatten(item)]
    assert isinstance(value, (int, float))  # `const` holds numbers
    return [float(value)]


def over_tokens(softmax: Equation) -> bool:
    """Whether a softmax weighs tokens, as attention does, and not a fixed number of things (a router's experts)."""
    return isinstance(softmax.result.type.shape[-1], str)


ATTENTION = Rule(
    "attention",
    before=_before(),
    after="""
        %attention = attention(%q4, %k4, %v4, %positions, %prefix, %sinks)
             {scale = $scale, causal = $causal, window = $window, softcap = $cap, slopes = $slopes,
              bf16_bias = $bf16}
        %y = reshape(%attention) {shape = $shape}
    """,
    anchor="p",
    refuse=_refuse,
    explain=lambda softmax, _: over_tokens(softmax),
)

FUSE_ATTENTION = Pass("fuse_attention", lambda graph, log: rewrite(graph, (ATTENTION,), log))
