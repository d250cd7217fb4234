"""Text -> graph: the inverse of the printer, and the reader of patterns in rewrite rules.

The grammar is the printer's output. `$name` stands for an attribute or literal to bind and is allowed in patterns only;
there types may be left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from compiler.ir.core import Arg, AttrValue, Block, Equation, Graph, Value
from compiler.ir.types import DTYPES, Dim, Sym, TensorType
from specs.errors import SpecRTError, Where

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|//[^\n]*)
      |(?P<place>@[ ][^\n]*)
      |(?P<string>"(?:[^"\\\n]|\\.)*")
      |(?P<value>%[A-Za-z0-9_.]+)
      |(?P<hole>\$[A-Za-z_][A-Za-z0-9_]*)
      |(?P<range>\.\.)
      |(?P<number>-?(?:\d+\.(?!\.)\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\d+|inf\b))
      |(?P<word>[A-Za-z_][A-Za-z0-9_]*)
      |(?P<mark>=>|[(){}\[\],:=])""",
    re.VERBOSE,
)
_ESCAPES = {"n": "\n", '"': '"', "\\": "\\"}
# The type of a value whose definition a pattern leaves untyped.
UNTYPED = TensorType("any")


@dataclass(frozen=True)
class Hole:
    """`$name` in a pattern: binds an attribute or a literal operand."""

    name: str


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


class _Reader:
    def __init__(self, text: str, file: str, *, pattern: bool) -> None:
        self.text, self.file, self.pattern = text, file, pattern
        self.tokens = self._scan()
        self.next = 0
        self.scope: dict[str, Value] = {}

    def _scan(self) -> list[_Token]:
        tokens, at = [], 0
        while at < len(self.text):
            match = _TOKEN.match(self.text, at)
            if match is None:
                raise self.error(f"unexpected character {self.text[at]!r}", at)
            if match.lastgroup != "space":
                tokens.append(_Token(str(match.lastgroup), match.group(), at))
            at = match.end()
        return [*tokens, _Token("end", "end of text", len(self.text))]

    def error(self, message: str, at: int | None = None) -> SpecRTError:
        at = self.tokens[self.next].at if at is None else at
        before = self.text[:at]
        where = Where(self.file, before.count("\n") + 1, at - (before.rfind("\n") + 1) + 1)
        return SpecRTError("IR-001", message, where=where)

    @property
    def token(self) -> _Token:
        return self.tokens[self.next]

    def peek(self, text: str) -> bool:
        return self.token.text == text and self.token.kind != "string"

    def take(self, text: str | None = None, kind: str | None = None) -> str:
        token = self.token
        if (text is not None and token.text != text) or (kind is not None and token.kind != kind):
            raise self.error(f"expected {text or kind}, got `{token.text}`")
        self.next += 1
        return token.text

    def accept(self, text: str) -> bool:
        if self.peek(text):
            self.next += 1
            return True
        return False

    def integer(self) -> int:
        if not re.fullmatch(r"-?\d+", self.token.text):
            raise self.error(f"expected an integer, got `{self.token.text}`")
        return int(self.take())

    # -- pieces ------------------------------------------------------------------------------------------------

    def type(self) -> TensorType:
        dtype = self.take(kind="word")
        if dtype not in DTYPES and dtype != "any":
            raise self.error(f"unknown element type `{dtype}`; known: {', '.join(DTYPES)}")
        self.take("[")
        shape: list[Dim] = []
        while not self.accept("]"):
            shape.append(self.integer() if self.token.kind == "number" else self.take(kind="word"))
            if not self.peek("]"):
                self.take(",")
        return TensorType(dtype, tuple(shape))

    def definition(self) -> Value:
        name = self.take(kind="value")[1:]
        if self.pattern and not self.peek(":"):
            value = Value(name, UNTYPED)
        else:
            self.take(":")
            value = Value(name, self.type())
        if name in self.scope and not self.pattern:
            raise self.error(f"`%{name}` is defined twice")
        self.scope[name] = value
        return value

    def use(self) -> Value:
        name = self.take(kind="value")[1:]
        if name not in self.scope:
            if not self.pattern:
                raise self.error(f"`%{name}` is used before it is defined")
            self.scope[name] = Value(name, UNTYPED)
        return self.scope[name]

    def literal(self) -> AttrValue:
        token = self.token
        if token.kind == "number":
            self.next += 1
            return float(token.text) if re.search(r"[.einf]", token.text) else int(token.text)
        if token.kind == "string":
            self.next += 1
            return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match.group(1), match.group(1)), token.text[1:-1])
        if token.kind == "hole" and self.pattern:
            self.next += 1
            return Hole(token.text[1:])  # type: ignore[return-value]  # patterns only; the matcher reads it
        if self.accept("("):
            items: list[AttrValue] = []
            while not self.accept(")"):
                items.append(self.literal())
                if not self.peek(")"):
                    self.take(",")
            return tuple(items)
        words: dict[str, AttrValue] = {"none": None, "true": True, "false": False, "nan": float("nan")}
        if token.kind == "word" and token.text in words:
            self.next += 1
            return words[token.text]
        raise self.error(f"expected a literal, got `{token.text}`")

    def arg(self) -> Arg:
        if self.token.kind == "value":
            return self.use()
        if self.accept("_"):
            return None
        return self.literal()  # type: ignore[return-value]  # the verifier refuses strings and tuples here (C4)

    # -- equations ---------------------------------------------------------------------------------------------

    def equation(self) -> Equation:
        starts = self.next
        results_at = self.token.at
        names = [self._result()]
        while self.accept(","):
            names.append(self._result())
        self.take("=")
        op = self.take(kind="word")
        self.take("(")
        args: list[Arg] = []
        while not self.accept(")"):
            args.append(self.arg())
            if not self.peek(")"):
                self.take(",")
        attrs: list[tuple[str, AttrValue]] = []
        if self.accept("{"):
            while not self.accept("}"):
                key = self.take(kind="word")
                self.take("=")
                attrs.append((key, self.literal()))
                if not self.peek("}"):
                    self.take(",")
        body, where = None, None
        if self.peek("("):
            body, where = self.block()
        elif self.token.kind == "place":
            where = self.place()
        for value in names:
            if value.name in self.scope and not self.pattern:
                self.next = starts
                raise self.error(f"`{value}` is defined twice", results_at)
            self.scope[value.name] = value
        return Equation(op, tuple(args), tuple(names), tuple(attrs), body, where)

    def _result(self) -> Value:
        name = self.take(kind="value")[1:]
        if self.pattern and not self.peek(":"):
            return Value(name, UNTYPED)
        self.take(":")
        return Value(name, self.type())

    def place(self) -> Where:
        text = self.take(kind="place")[2:].strip()
        match = re.fullmatch(r"(.*?)(?::(\d+))?(?::(\d+))?", text)
        assert match is not None  # every part is optional
        file, line, column = match.groups()
        return Where(file, int(line) if line else None, int(column) if column else None)

    def block(self) -> tuple[Block, Where | None]:
        self.take("(")
        params: list[Value] = []
        while not self.accept(")"):
            params.append(self.definition())
            if not self.peek(")"):
                self.take(",")
        self.take("=>")
        self.take("{")
        where = self.place() if self.token.kind == "place" else None
        equations = []
        while not self.peek("yield"):
            equations.append(self.equation())
        self.take("yield")
        results = [self.use()]
        while self.accept(","):
            results.append(self.use())
        self.take("}")
        return Block(tuple(params), tuple(equations), tuple(results)), where

    def graph(self) -> Graph:
        self.take("graph")
        name = self.take(kind="word")
        self.take("(")
        inputs: list[Value] = []
        while not self.accept(")"):
            inputs.append(self.definition())
            if not self.peek(")"):
                self.take(",")
        self.take("{")
        dims: list[Sym] = []
        while self.accept("dim"):
            dim = self.take(kind="word")
            self.take("in")
            lo = self.integer()
            self.take("..")
            opt = self.integer()
            self.take("..")
            dims.append(Sym(dim, lo, opt, self.integer()))
        equations = []
        while not self.peek("return"):
            equations.append(self.equation())
        self.take("return")
        outputs = []
        while True:
            key = self.take(kind="word")
            self.take("=")
            outputs.append((key, self.use()))
            if not self.accept(","):
                break
        self.take("}")
        self.take(kind="end")
        return Graph(name, tuple(dims), tuple(inputs), tuple(equations), tuple(outputs))


def parse(text: str, file: str = "<ir>") -> Graph:
    """The graph that `text` prints; raises SpecRTError IR-001 with line and column where it is malformed."""
    return _Reader(text, file, pattern=False).graph()


def parse_pattern(text: str, file: str = "<rule>") -> tuple[Equation, ...]:
    """The equations of one side of a rewrite rule; raises SpecRTError IR-001."""
    reader = _Reader(text, file, pattern=True)
    equations = []
    while reader.token.kind != "end":
        equations.append(reader.equation())
    return tuple(equations)
