"""Which option of a multiple-choice question an answer chooses, by the rules of VLMEvalKit (`utils/matching_util.py`).

VLMEvalKit asks a language model where its rules find none; here such an answer is wrong (its `exact_matching` setting).
"""

import re
from collections.abc import Mapping

_MARKS = str.maketrans(".()[],:;!*#{}", " " * 13)
_PLACES_FROM_THE_END = 5
"""A letter farther from the end of the answer than so many words is not taken for the choice."""
_SENTENCE = re.compile(r"answer\s+is\s+\**([A-D])\b", re.IGNORECASE)
"""VLMEvalKit's has no end of the word, and finds a C in "the answer is correct"."""


def chosen_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option; None if no rule finds one.

    1. The only one of the letters that stands as a word of its own, if it is among the last five words.
    2. "answer is X", X from A to D.
    3. The only option whose text is in the answer, where the answer is at most twice as long as all options.

    Args:
        answer: of the model.
        options: texts by letters.
    """
    words = answer.translate(_MARKS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - _PLACES_FROM_THE_END:
        return letters[0]
    if not letters and "Z" in words:  # VLMEvalKit's letter for "none of them"
        return None
    stated = _SENTENCE.search(answer)
    if stated is not None and stated[1].upper() in options:
        return stated[1].upper()
    return _named_option(answer.lower(), options)


def _named_option(answer: str, options: Mapping[str, str]) -> str | None:
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    named = [letter for letter, text in options.items() if text.lower() in answer]
    return named[0] if len(named) == 1 else None
