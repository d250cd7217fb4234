"""From ids to the text of a choice: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from runtime.tokenizer import Pieces, Tokenizer


class StopText:
    """Passes text on, but holds back what may turn out to be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, piece: str) -> str:
        """What can be shown. The stop string that is complete first ends it, however the text is cut into pieces."""
        text = self._held + piece
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class ChoiceText:
    """The text of one choice; `finish` is set with its last id, `tokens` counts those that made it."""

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int], stops: Sequence[str], ends: Collection[int]) -> None:
        """After the prompt's ids; `ends` are the stop tokens, which give no text."""
        self._pieces: Pieces = tokenizer.pieces(after)
        self._stops = StopText(stops)
        self._ends = ends
        self.tokens = 0
        self.finish: str | None = None

    def push(self, ids: Sequence[int], finish: str | None) -> str:
        """What can be shown after these ids, the last ones where `finish` is given."""
        shown = ""
        for token in ids:
            self.tokens += 1
            if token not in self._ends:
                shown += self._stops.push(self._pieces.push(token))
            if self._stops.hit:
                self.finish = "stop"
                return shown
        if finish is not None:
            shown += self._stops.push(self._pieces.end())
            self.finish = "stop" if self._stops.hit else finish
            shown += self._stops.end()
        return shown
