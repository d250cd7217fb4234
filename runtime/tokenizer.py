"""Text to ids and back, through the bundle's tokenizer.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text, with the special tokens that the model's tokenizer adds, unless `special` is off."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that `ids` add where they come after other ids; special tokens give nothing."""
        return "".join(self.stream(ids, after))

    def stream(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """The same piece by piece; an id whose bytes end within a character waits for the next ones."""
        pieces = self.pieces(after)
        for token in ids:
            if piece := pieces.push(token):
                yield piece
        if piece := pieces.end():
            yield piece

    def pieces(self, after: Sequence[int] = ()) -> Pieces:
        """The same for who gets the ids one by one."""
        return Pieces(self._text, after)

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text


class Pieces:
    """The text of ids that come one by one; an id whose bytes end within a character waits for the next ones."""

    def __init__(self, text: Callable[[Sequence[int]], str], after: Sequence[int]) -> None:
        self._text = text
        self._known = list(after[-_CONTEXT:])
        self._shown = len(text(self._known))
        self._waiting = 0

    def push(self, token: int) -> str:
        """What can be shown now that this id has come; often nothing."""
        self._known.append(token)
        self._waiting += 1
        text = self._text(self._known)
        if text.endswith(_UNFINISHED) and self._waiting < _LONGEST:
            return ""
        piece = text[self._shown :]
        self._known = self._known[-max(_CONTEXT, self._waiting) :]
        self._shown = len(self._text(self._known))
        self._waiting = 0
        return piece

    def end(self) -> str:
        """What was held back, now that no further id comes."""
        piece = self._text(self._known)[self._shown :] if self._waiting else ""
        self._waiting = 0
        return piece
