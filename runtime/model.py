"""The model that a user holds: lists of token ids, or text, in; logits, ids or text out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from runtime.beam_request import BeamRequest
from runtime.beam_search import Beams, Hypothesis
from runtime.bundle import Bundle, Limits
from runtime.chat import ChatTemplate
from runtime.checks import as_array, check_inputs
from runtime.encoder import Encoder
from runtime.engine import Engine
from runtime.executable import Executable, Floats
from runtime.request import Request
from runtime.sampling import Sampling
from runtime.tokenizer import Tokenizer
from specs.errors import SpecRTError

NEW_TOKENS = 128  # where the caller does not say how many
Rows = Sequence[Sequence[int]]
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
_BEAMS = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")


@dataclass(frozen=True)
class Event:
    """One new id of a row; `finish` with its last: the stop token came, or max_new_tokens did."""

    row: int
    token: int
    index: int
    finish: Literal["stop", "length"] | None


class Model:
    """A loaded bundle; `close` gives back memory and device, also at the end of a `with` block."""

    def __init__(self, bundle: Bundle, executable: Executable, *, step_tokens: int | None = None) -> None:
        """Over an executable of the bundle's plan; `load` makes both. Raises SpecRTError RUN-013."""
        self.bundle, self.executable = bundle, executable
        self.role, self.vocab, self.stop = bundle.role, bundle.vocab, bundle.stop
        self.limits: Limits = bundle.limits
        self._tokenizer: Tokenizer | None = None
        self._template: ChatTemplate | None = None
        self._engine: Engine | None = None
        self._encoder: Encoder | None = None
        if bundle.role == "decoder":
            self._engine = Engine(
                executable, max_batch=self.limits.max_batch, max_sequence=self.limits.max_sequence, vocab=self.vocab,
                inputs=[port.name for port in bundle.program.inputs], derive=bundle.derive, step_tokens=step_tokens,
            )  # fmt: skip
        else:
            self._encoder = Encoder(executable, bundle)

    def close(self) -> None:
        """Give back what the model holds; it can't be run afterwards."""
        self.executable.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def engine(self) -> Engine:
        """Where requests are submitted and stepped, for serving. Raises SpecRTError RUN-014 for an encoder."""
        if self._engine is None:
            hint = "`forward` gives its outputs"
            raise SpecRTError("RUN-014", f"`{self.bundle.name}` is an encoder: it generates no tokens", hint=hint)
        return self._engine

    # -- numbers --------------------------------------------------------------------------------------------------

    def forward(self, token_lists: Rows, **inputs: Sequence[Any]) -> list[dict[str, Floats]]:
        """All outputs of each row by name, [len, ...]; `inputs` are the model's further inputs, one value for each row;
        those that follow from the tokens by a rule of the bundle may be left out.

        Raises SpecRTError RUN-001 to RUN-009, RUN-017.
        """
        rows = _rows(token_lists)
        if self._encoder is not None:
            return self._encoder.run(rows, inputs)
        each = self._each(inputs, len(rows))
        requests: list[Request] = []
        try:
            for row, given in zip(rows, each, strict=True):
                requests.append(self.engine.submit_logits(row, inputs=given))
            while any(request.finish is None for request in requests):
                self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)
        return [{"logits": request.logits} for request in requests]

    def logits(self, token_lists: Rows, **inputs: Sequence[Any]) -> list[Floats]:
        """Logits f32[len, V] of each row. Raises SpecRTError RUN-001 to RUN-009, RUN-015 where the model has none."""
        if "logits" not in self.bundle.program.values:
            names = ", ".join(f"`{name}`" for name in self.bundle.program.values)
            raise SpecRTError(
                "RUN-015", f"`{self.bundle.name}` has no logits", hint=f"`forward` gives its outputs: {names}"
            )
        return [outputs["logits"] for outputs in self.forward(token_lists, **inputs)]

    # -- new tokens -----------------------------------------------------------------------------------------------

    def generate(
        self,
        token_lists: Rows,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] | None = None,
        stop: int | Iterable[int] | None = None,
        num_beams: int | None = None,
        length_penalty: float | None = None,
        early_stopping: bool | Literal["never"] | None = None,
        num_return_sequences: int | None = None,
        **inputs: Sequence[Any],
    ) -> list[list[int]]:
        """New ids of each row: the likeliest each time, or drawn where temperature, top_k or top_p is given.

        With several beams those that `search` finds: `num_return_sequences` of each row, a row's behind another's.

        A row ends after `max_new_tokens` (by default 128, or what the limit leaves) or with a stop token, which belongs
        to the new ids; `stop` None means the bundle's, () means none. A `seed` holds for each row by itself, or there
        is one for each.
        Raises SpecRTError RUN-001 to RUN-009, RUN-017, RUN-020 for sampling values, RUN-021 for stop,
        RUN-022 for beams, RUN-030 for NaN.
        """
        beams = self._beams(num_beams, length_penalty, early_stopping, num_return_sequences)
        if beams.num_beams > 1:
            sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            found = self._search(token_lists, beams, max_new_tokens, repetition_penalty, stop, inputs, **sampling)
            return [hypothesis.ids for row in found for hypothesis in row]
        requests = self._submit(
            token_lists, max_new_tokens, stop, seed, inputs,
            temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty,
        )  # fmt: skip
        for _ in self._run(requests):
            pass
        return [request.new for request in requests]

    def search(self, token_lists: Rows, **options: Any) -> list[list[Hypothesis]]:
        """Beam search: the `num_return_sequences` best continuations of each row, best first; options as of `generate`.

        Raises SpecRTError as `generate`; RUN-022 also for one beam, and for options that draw tokens.
        """
        beams = self._beams(*(options.pop(name, None) for name in _BEAMS))
        most, penalty, stop = (options.pop(name, None) for name in ("max_new_tokens", "repetition_penalty", "stop"))
        sampling = {name: options.pop(name, None) for name in ("temperature", "top_k", "top_p")}
        options.pop("seed", None)  # nothing is drawn
        return self._search(token_lists, beams, most, penalty, stop, options, **sampling)

    def stream(self, token_lists: Rows, **options: Any) -> Iterator[Event]:
        """`generate`, each id as it comes; what is left is cancelled where the iterator is closed early.

        Raises SpecRTError as `generate`, RUN-023 for several beams.
        """
        yield from self._run(self._submit_options(token_lists, options))  # submitted when first asked for an id

    def text(self, prompt: str, **options: Any) -> str:
        """The text that goes on from a prompt, the best where there are beams; options as of `generate`.

        Raises SpecRTError as `generate`, RUN-009.
        """
        if self._beams(*(options.get(name) for name in _BEAMS)).num_beams > 1:
            ids = self.encode(prompt)
            return self.decode(self.search([ids], **options)[0][0].ids, after=ids)
        return "".join(self.text_stream(prompt, **options))

    def text_stream(self, prompt: str, **options: Any) -> Iterator[str]:
        """`text`, piece by piece as it comes. Raises SpecRTError as `text`, RUN-023 for several beams."""
        tokenizer = self.tokenizer
        ids = tokenizer.encode(prompt)
        events = self.stream([ids], **options)
        return tokenizer.stream((event.token for event in events), after=ids)

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer. Raises SpecRTError RUN-009 where it has none, RUN-010 where it can't be read."""
        if self._tokenizer is None:
            if self.bundle.tokenizer is None:
                hint = "use `generate` with token ids, or compile from a checkpoint folder with a tokenizer.json"
                raise SpecRTError("RUN-009", f"the bundle `{self.bundle.name}` has no tokenizer", hint=hint)
            self._tokenizer = Tokenizer(self.bundle.tokenizer)
        return self._tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that `ids` add after other ids."""
        return self.tokenizer.decode(ids, after)

    def chat(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> list[int]:
        """Ids of a conversation, `role` and `content` of each message, up to where the model answers.

        Rendered by the checkpoint's chat template as transformers' `apply_chat_template` does; `variables` are the
        template's own. Raises SpecRTError RUN-009, RUN-050 without a template, RUN-051, RUN-052.
        """
        if self._template is None:
            if self.bundle.chat is None:
                hint = (
                    "compile from a checkpoint with a chat_template, or give the prompt as text as the model expects it"
                )
                raise SpecRTError("RUN-050", f"the bundle `{self.bundle.name}` has no chat template", hint=hint)
            self._template = ChatTemplate(self.bundle.chat)
        return self.tokenizer.encode(self._template.render(messages, **variables), special=False)

    # -- how ------------------------------------------------------------------------------------------------------

    def _submit_options(self, token_lists: Rows, options: dict[str, Any]) -> list[Request]:
        if (beams := self._beams(*(options.pop(name, None) for name in _BEAMS)).num_beams) > 1:
            message = f"{beams} beams give no ids before the end: the best beam may change until then"
            raise SpecRTError("RUN-023", message, hint="use `generate` or `search`, or stream with `num_beams=1`")
        known = {name: options.pop(name) for name in _SAMPLING if name in options}
        return self._submit(
            token_lists, options.pop("max_new_tokens", None), options.pop("stop", None), options.pop("seed", None),
            options, **known,
        )  # fmt: skip

    def _submit(
        self,
        token_lists: Rows,
        max_new_tokens: int | None,
        stop: Any,
        seed: Any,
        inputs: dict[str, Any],
        **sampling: Any,
    ) -> list[Request]:
        engine = self.engine
        rows = _rows(token_lists)
        ends = self._stop(stop)
        each = self._each(inputs, len(rows))
        seeds: list[Any] = list(seed) if isinstance(seed, (list, tuple, np.ndarray)) else [seed] * len(rows)
        if len(seeds) != len(rows):
            raise SpecRTError(
                "RUN-020", f"`seed` has {len(seeds)} values for {len(rows)} prompts, expected one, or one for each"
            )
        requests: list[Request] = []
        try:
            for row, own, given in zip(rows, seeds, each, strict=True):
                how = Sampling(seed=own, **sampling)
                most = self._most(max_new_tokens, row)
                requests.append(engine.submit(row, how, max_new_tokens=most, stop=ends, inputs=given))
        except SpecRTError:
            for request in requests:
                engine.cancel(request)
            raise
        return requests

    def _search(
        self,
        token_lists: Rows,
        beams: Beams,
        max_new_tokens: int | None,
        repetition_penalty: float | None,
        stop: Any,
        inputs: dict[str, Any],
        **sampling: Any,
    ) -> list[list[Hypothesis]]:
        engine = self.engine
        if beams.num_beams == 1:
            raise SpecRTError("RUN-022", "`num_beams` is 1: nothing is searched", hint="use `generate`, or more beams")
        if not Sampling(repetition_penalty=repetition_penalty, **sampling).greedy:
            message = f"{beams.num_beams} beams take the likeliest tokens: temperature, top_k and top_p draw them"
            raise SpecRTError("RUN-022", message, hint="leave these out, or pass `num_beams=1`")
        rows, ends = _rows(token_lists), self._stop(stop)
        requests: list[BeamRequest] = []
        try:
            for row, given in zip(rows, self._each(inputs, len(rows)), strict=True):
                most = self._most(max_new_tokens, row)
                requests.append(
                    engine.submit_beams(
                        row, beams, repetition_penalty=repetition_penalty, max_new_tokens=most, stop=ends, inputs=given
                    )
                )
            for _ in self._run(requests):
                pass
        finally:
            for request in requests:
                engine.cancel(request)
        return [request.found for request in requests]

    def _most(self, max_new_tokens: int | None, row: Sequence[int]) -> int:
        if max_new_tokens is not None:
            return max_new_tokens
        return max(1, min(NEW_TOKENS, self.engine.max_sequence - len(row)))

    def _beams(self, *given: Any) -> Beams:
        """The bundle's way to search, with what the caller states of it."""
        stated = {name: value for name, value in zip(_BEAMS, given, strict=True) if value is not None}
        beams = replace(self.bundle.beams, **stated)
        if beams.num_beams == 1 and (without := [name for name in _BEAMS[1:] if name in stated]):
            message = f"`{without[0]}` is given, `num_beams` is 1"
            raise SpecRTError("RUN-022", message, hint="pass `num_beams` of 2 or more, or leave it out")
        return beams

    def _run(self, requests: Sequence[Request | BeamRequest]) -> Iterator[Event]:
        """Step until all requests have ended, whoever steps them; each id once."""
        open_rows = list(enumerate(requests))
        seen = [0] * len(requests)
        try:
            while open_rows:
                ended = False
                for row, request in open_rows:
                    while seen[row] < len(request.new):
                        index = seen[row]
                        seen[row] += 1
                        last = seen[row] == len(request.new)
                        finish = request.finish if last and request.finish in ("stop", "length") else None
                        yield Event(row, request.new[index], index, finish)
                    if request.error is not None:
                        raise request.error
                    ended = ended or request.finish is not None
                if ended:
                    open_rows = [(row, request) for row, request in open_rows if request.finish is None]
                if open_rows:
                    self.engine.step()
        finally:
            for request in requests:
                self.engine.cancel(request)

    def _stop(self, stop: Any) -> frozenset[int]:
        if stop is None:
            return frozenset(self.stop)
        try:
            ids = [int(token) for token in ([stop] if isinstance(stop, (int, np.integer)) else stop)]
        except (TypeError, ValueError) as error:
            raise SpecRTError("RUN-021", f"`stop` is {stop!r}, expected token ids; () for none") from error
        for token in ids:
            if not 0 <= token < self.vocab:
                raise SpecRTError("RUN-021", f"stop token {token} is out of range: ids go from 0 to {self.vocab - 1}")
        return frozenset(ids)

    def _each(self, inputs: dict[str, Any], count: int) -> list[dict[str, int]]:
        """Further inputs of a decoder, row by row."""
        check_inputs(inputs, self.engine.extra_inputs, self.engine.derive)
        names = [name for name in self.engine.extra_inputs if name in inputs]
        columns: dict[str, list[int]] = {}
        for name in names:
            values = as_array(inputs[name])
            if values.ndim != 1 or len(values) != count or values.dtype.kind not in "iu":
                message = (
                    f"input `{name}` is {inputs[name]!r}, expected whole numbers, one for each of {count} sequences"
                )
                raise SpecRTError("RUN-008", message)
            columns[name] = values.tolist()
        return [{name: columns[name][row] for name in names} for row in range(count)]


def _rows(token_lists: Rows) -> list[list[int]]:
    """Rows of plain ints. Raises SpecRTError RUN-003 for what are no lists of ids."""
    rows: list[list[int]] = []
    if isinstance(token_lists, str) or not isinstance(token_lists, Iterable):
        raise _no_rows(token_lists)
    for row in token_lists:
        array = as_array(row)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise _no_rows(row)
        rows.append(array.tolist())
    return rows


def _no_rows(found: object) -> SpecRTError:
    message = f"expected lists of token ids, one for each sequence; found {repr(found)[:80]}"
    return SpecRTError("RUN-003", message, hint="one prompt is [[1, 2, 3]]; for text there is `text`")
