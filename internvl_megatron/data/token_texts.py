"""The text of every token by itself, to show people what a model is trained on."""

from collections.abc import Sequence

from internvl_megatron.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
"""What a tokenizer decodes a part of a character to."""
MOST_PARTS = 8
"""Tokens that may make up one character between them."""


def token_texts(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """The text of each token. A character that several tokens make up is with the first; the others have none."""
    texts: list[str] = []
    before: Sequence[int] = ()
    while len(texts) < len(ids):
        at = len(texts)
        text, count = _text_behind(before, ids[at : at + 1], tokenizer), 1
        for parts in range(2, min(MOST_PARTS, len(ids) - at) + 1):
            if REPLACEMENT not in text:
                break
            whole = _text_behind(before, ids[at : at + parts], tokenizer)
            if REPLACEMENT not in whole:
                text, count = whole, parts
        texts += [text, *[""] * (count - 1)]
        before = ids[at : at + count]
    return texts


def _text_behind(before: Sequence[int], ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """What tokens add to the text of those before them: sentencepiece leaves out the space at the start of a text."""
    earlier, together = tokenizer.decode(before), tokenizer.decode([*before, *ids])
    is_behind = together.startswith(earlier) and REPLACEMENT not in earlier
    return together[len(earlier) :] if is_behind else tokenizer.decode(ids)
