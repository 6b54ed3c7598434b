"""Final answers of worked-out solutions: where they stand, and when two are the same."""

import pytest

from internvl_megatron.evaluate.final_answer import final_answer, is_match, normal_form


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("372\n\n3+7=10\n\n12", "12"),
        ("So x = 3.\n\n**Final answer:** 7", "** 7"),
        ("The answer is 5. No: the answer is: 6\nwhich is even", "6"),
        ("Answer:\n\n B ", "B"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}; the answer is 3", r"\frac{1}{2}"),
        (r"It is \boxed{4", r"It is \boxed{4"),
        (r"It is \boxed{4} or \boxed{5", "4"),
        ("The answer is:", "The answer is:"),
        ("twelve\n \n", "twelve"),
        ("", ""),
        (" \n ", ""),
    ],
)
def test_the_final_answer_is_found(text: str, wanted: str) -> None:
    assert final_answer(text) == wanted


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("12", "12"),
        ("so it is\n\n**12.**", "12"),
        ("Answer: 1,234", "1234"),
        ("12.0", "12"),
        ("0.5", "1/2"),
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"$-\frac{6}{4}$", "-1.5"),
        (r"\boxed{\text{Grey  Heron}}", "grey heron"),
        ("(B)", "B"),
        ("The answer is B. A heron", "B"),
        ("b: a heron", "B"),
        ("50%", "50%"),
        ('"Even".', "even"),
    ],
)
def test_equal_answers(answer: str, truth: str) -> None:
    assert is_match(answer, truth)


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("12\n\n13", "12"),
        ("112", "12"),
        ("3 + 4", "7"),
        ("50%", "0.5"),
        ("5 cm", "5"),
        ("A heron", "A"),
        ("Because", "B"),
        ("1/0", "0"),
        ("", "12"),
        ("1,23", "123"),
        ("12.5.", "12"),
    ],
)
def test_different_answers(answer: str, truth: str) -> None:
    assert not is_match(answer, truth)


def test_long_numbers_are_texts() -> None:
    """A number of a billion digits must not be computed."""
    digits = "9" * 5000
    assert normal_form(digits) == digits and is_match(digits, digits)
