"""Whether two numbers are the same when both are rounded, as MathVista's own script compares them."""

import math


def is_rounded_match(answer: str, truth: str, digits: int) -> bool:
    """Whether both are numbers and equal to so many digits behind the point. Thousands may be parted by commas; marks of money, per
    cent and formulas around the answer do not count."""
    given, wanted = (_number(text) for text in (answer, truth))
    return given is not None and wanted is not None and round(given, digits) == round(wanted, digits)


def _number(text: str) -> float | None:
    try:
        value = float(text.strip(" $%\\().,*").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None
