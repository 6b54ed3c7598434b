"""VQA accuracy, the metric of VQAv2 and TextVQA: agreement with ten people, min(1, matches / 3) (arXiv 1505.00468).

Answers are normalised as the official script does it: punctuation, articles, number words, apostrophes of contractions.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")
_MOST_FULL_STOPS = 32
"""The official script hands a flag to `re.sub` where the number of replacements goes: later full stops stay."""
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"zero": "0", **{word: str(value) for value, word in enumerate(_NUMBER_WORDS)}}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
    "how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock "
    "oughtn't 'ow's'at shan't should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's "
    "they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd "
    "where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll "
    "y'all'd've you'd you'd've you'll you're you've"
)


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, character in enumerate(word) if character == "'"]


_SPELLED = {wrong: right for right in _CONTRACTIONS.split() for wrong in _without_one_apostrophe(right)}
"""Contractions that lack an apostrophe, and what they are with it."""


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """0 to 1: the mean, over each person left out in turn, of min(1, how many of the others say the same / 3)."""
    given = normalised(answer)
    others_agree = [normalised(truth) == given for truth in truths]
    total = sum(others_agree)
    return sum(min(1.0, (total - own) / 3) for own in others_agree) / len(others_agree)


def normalised(text: str) -> str:
    """What answers that count as the same have in common."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (_NUMBERS.get(word, word) for word in without_punctuation(text).lower().split())
    return " ".join(_SPELLED.get(word, word) for word in words if word not in _ARTICLES)


def without_punctuation(text: str) -> str:
    """The text without marks. A mark beside a blank goes without trace, and so do all where a number has a comma; others leave a
    blank."""
    has_comma, stripped = _COMMA_IN_NUMBER.search(text) is not None, text
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_blank or has_comma else " ")
    return _FULL_STOP.sub("", stripped, count=_MOST_FULL_STOPS)
