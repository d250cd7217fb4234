"""Text to ids and back, through the bundle's tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specs.errors import SpecRTError, Where

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_CONTEXT = 8  # ids before the new ones that decide how they are written: spaces, bytes of a character
_UNFINISHED = "�"  # what a decoder gives for bytes that are no whole character yet
_LONGEST = 8  # ids that may be held back for a character: 4 bytes each an id, and some slack


class Tokenizer:
    """A tokenizer as the `tokenizers` package reads it."""

    def __init__(self, path: Path) -> None:
        """Read tokenizer.json. Raises SpecRTError RUN-010 where it is none."""
        from tokenizers import Tokenizer as Backend

        try:
            self._backend: Backend = Backend.from_file(str(path))
        except Exception as error:  # the package raises nothing narrower
            hint = "compile the bundle again from a checkpoint whose tokenizer.json is whole"
            raise SpecRTError(
                "RUN-010", f"tokenizer.json can't be read: {error}", where=Where(str(path)), hint=hint
            ) from error
        self._backend.no_padding()
        self._backend.no_truncation()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the model's tokenizer adds."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that `ids` add where they come after other ids; special tokens give nothing."""
        return "".join(self.stream(ids, after))

    def stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """The same piece by piece; an id whose bytes end within a character waits for the next ones."""
        known = list(after[-_CONTEXT:])
        shown = self._text(known)
        waiting = 0
        for token in ids:
            known.append(token)
            waiting += 1
            text = self._text(known)
            if text.endswith(_UNFINISHED) and waiting < _LONGEST:
                continue
            if len(text) > len(shown):
                yield text[len(shown) :]
            known = known[-max(_CONTEXT, waiting) :]
            shown = self._text(known)
            waiting = 0
        if waiting and len(text := self._text(known)) > len(shown):
            yield text[len(shown) :]

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text
