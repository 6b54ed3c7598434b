r"""Whether a worked-out answer ends where it should: its final answer, extracted and compared with the known one.

The final answer is, whichever is there first in this list:

1. what is in the last `\boxed{...}`;
2. what follows the last "answer:", "answer is" or "answer is:" (in any case) on its line, or on the next line if nothing
   follows;
3. the last line that is not empty.

Two are equal if their normal forms are:

* markdown's and LaTeX's marks around it (`*`, `_`, backquotes, `$`, `\(`, `\[`, `\text{...}`), quotes and a final full stop or
  comma are dropped, white space is one blank, capitals are small;
* a letter with its option, "(b)", "B.", "B: a heron", is the letter, where the known answer is a single letter;
* numbers are compared by value: 1,234 = 1234, 12.0 = 12, \frac{1}{2} = 1/2 = 0.5. A sign of percent or a unit must be equal.

Nothing is evaluated: "3 + 4" is not 7.
"""

import re
from fractions import Fraction

_MARKER = re.compile(r"\banswer(?:\s*:|\s+is\b\s*:?)", re.IGNORECASE)
_MARKS = re.compile(r"[*_`$]+|\\[()\[\]]")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")
_OPTION = re.compile(r"\(?([a-z])(?:[).:](?:\s.*)?)?", re.DOTALL)
_NUMBER = re.compile(r"([+-]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:/(\d+))?")
_LONGEST_NUMBER = 100
"""Characters; what is longer is compared as text."""


def final_answer(text: str) -> str:
    """What an answer comes to; empty if there is no text."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    markers = list(_MARKER.finditer(text))
    rest = text[markers[-1].end() :] if markers else ""
    lines = [line.strip() for line in (rest if rest.strip(" *_`$\n") else text).splitlines() if line.strip(" *_`$")]
    if not lines:
        return ""
    return lines[0] if rest.strip(" *_`$\n") else lines[-1]


def normal_form(answer: str) -> str:
    """What answers that say the same have in common."""
    plain = _LATEX_TEXT.sub(r"\1", _LATEX_FRACTION.sub(r"\1/\2", answer))
    plain = " ".join(_MARKS.sub("", plain).split()).lstrip("\"' ").rstrip("\"'., ").lower()
    number = _number(plain)
    return plain if number is None else str(number)


def is_match(answer: str, truth: str) -> bool:
    """Whether an answer, worked out or bare, comes to the known one."""
    wanted = normal_form(truth)
    found = normal_form(final_answer(answer))
    if re.fullmatch("[a-z]", wanted):
        option = _OPTION.fullmatch(found)
        return option is not None and option[1] == wanted
    return bool(found) and found == wanted


def _last_boxed(text: str) -> str | None:
    r"""What is in the last `\boxed{...}` whose braces are closed."""
    for match in reversed(list(re.finditer(r"\\boxed\{", text))):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return text[match.end() : place]
    return None


def _number(text: str) -> Fraction | None:
    """The value of a text that is a number or a fraction of whole numbers."""
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if match is None or (match[3] is not None and not int(match[3])):
        return None
    value = Fraction(match[2].replace(",", "")) / int(match[3] or 1)
    return -value if match[1] == "-" else value
