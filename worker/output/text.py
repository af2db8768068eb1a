"""The text of one choice: what may be shown of the tokens drawn so far.

A pure function of the ids: given the logged ids, another worker's stream has the same state. It holds back partial
characters and whatever may begin a stop string. It knows nothing of where ids come from or who reads.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tokenizers import Tokenizer

from worker.output.decoding import vocabulary
from worker.output.stops import StopScanner


class TextStream:
    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), shown: Collection[int] = (),
                 min_tokens: int = 0):
        self.stop = ""                  # the stop string that was found: the text ends before it
        self._num_early = min_tokens    # tokens to come during which no stop string counts
        self._decoder = vocabulary(tokenizer).decoder(frozenset(shown))
        self._scanner = StopScanner(stop) if any(stop) else None
        self._held = ""

    @property
    def stopped(self) -> bool:
        return bool(self.stop)

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that may be shown now. One call or many give the same text."""
        if not self._num_early:
            return self._show(self._decode(token_ids))
        num_early, self._num_early = self._num_early, max(0, self._num_early - len(token_ids))
        text = self._show(self._decode(token_ids[:num_early]), may_stop=False)
        return text + self._show(self._decode(token_ids[num_early:]))

    def _decode(self, token_ids: Sequence[int]) -> str:
        return "".join([self._decoder.feed(token_id) for token_id in token_ids])

    def finish(self) -> str:
        """After the last token: the text held back."""
        text = self._show(self._decoder.finish())
        released, self._held = self._held, ""
        return text + released

    def _show(self, piece: str, *, may_stop: bool = True) -> str:
        if self._scanner is None:
            return piece
        if self.stopped:
            return ""
        found, num_held, self.stop = self._scanner.scan(piece, may_find=may_stop)
        text = self._held + piece
        if found is not None:
            text = text[:len(self._held) + found]
        cut = len(text) - num_held
        self._held = text[cut:]
        return text[:cut]

    def __repr__(self) -> str:
        return f"<TextStream {'stopped' if self.stopped else 'open'}, {len(self._held)} characters held>"
