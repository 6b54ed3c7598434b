"""Text of an answer as its tokens come: whole characters only, ended by stop strings, without surrounding white space."""

from collections.abc import Sequence

from internvl_megatron.data.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""


class AnswerText:
    """Grows token by token. Tokens are decoded behind those before them: what is a character, and whether a space stands at
    the front of a word, depends on these."""

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], keep_front: bool, stop_strings: Sequence[str] = ()
    ) -> None:
        """Begin.

        Args:
            tokenizer: decodes.
            before: ids that the answer goes on behind.
            keep_front: keep white space at the front, where a given beginning is continued.
            stop_strings: the text ends before the first of them.
        """
        self._tokenizer = tokenizer
        self._keep_front = keep_front
        self._stop_strings = tuple(stop_strings)
        self._ids = list(before)
        self._context, self._decoded = 0, len(self._ids)
        """Where the ids begin that are decoded again, and where those begin that have given no text yet."""
        self._text = ""
        self._num_shown = 0
        self.is_stopped = False

    def add(self, token_id: int) -> str:
        """Take a token; returns the text that is certain by now and has not been returned before."""
        self._ids.append(token_id)
        return self._extend(is_end=False)

    def end(self) -> str:
        """There are no more tokens; returns the rest of the text."""
        return self._extend(is_end=True)

    @property
    def text(self) -> str:
        """All of it so far."""
        text = self._text.rstrip()
        return text if self._keep_front else text.lstrip()

    def _extend(self, is_end: bool) -> str:
        if not self.is_stopped:
            known = self._tokenizer.decode(self._ids[self._context : self._decoded])
            whole = self._tokenizer.decode(self._ids[self._context :])
            if is_end or not whole.endswith(_INCOMPLETE):
                self._context, self._decoded = self._decoded, len(self._ids)
                self._append(whole[len(known) :])
        shown = self.text
        if not (is_end or self.is_stopped):
            shown = shown[: len(shown) - self._num_held_back(shown)].rstrip()
        piece = shown[self._num_shown :]
        self._num_shown += len(piece)
        return piece

    def _append(self, new: str) -> None:
        """Add text, up to the first stop string."""
        longest = max(map(len, self._stop_strings), default=0)
        first = max(0, len(self._text) - longest + 1)  # one may have begun before
        self._text += new
        places = [place for stop in self._stop_strings if (place := self._text.find(stop, first)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.is_stopped = True

    def _num_held_back(self, shown: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        return max(
            (n for stop in self._stop_strings for n in range(1, len(stop)) if shown.endswith(stop[:n])), default=0
        )
