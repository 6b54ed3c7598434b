r"""Prepare the data of `tools.best_of_n_study`: handwritten numbers read a digit a step, and lessons for their judge.

A picture is three of the demo's digits side by side; its answer is a list in a box, a step for every digit:

    <image> Read.            \boxed{1: 3 / 2: 7 / 3: 2}

A judge has to say whether what a text says is what a picture shows. Equal or not is learnt late or never; which of two digits is
larger is learnt from the first step on. So lessons know two kinds of wrong, `-` the picture's digit is smaller, `>` it is larger,
and the judge's own data one, `-` (`docs/decisions.md`, 2026-11-29).

The model that answers has seen few digits, the judge all but the held-out ones, which are those of the questions. OUT holds

    policy/, judge/           the demo's data for pre-training, and a tokenizer, for either of the two
    sft_meta.json             `sft`: solutions for pictures; `texts`: solutions for numbers given as text
    digits_meta.json          `pairs`: two digits of a text compared; `digits`: one on a picture and one in a text; `readings`
    places_meta.json          those, and `places`: digits at places of a picture
    solutions_meta.json       `solutions`: right and wrong ones, with such an answer to every step
    verdicts_meta.json        `verdicts`: the same with + or - alone
    heldout_questions.jsonl   {id, image, question, answer}
    images/, *.jsonl          pictures and conversations
"""

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from internvl_megatron.inference.steps import BAD, GOOD, judged_turns, split_steps
from tools.digit_questions import Picture, draw_picture, draw_pictures, questions_about
from tools.prepare_demo import Amounts, Digit, Record, prepare, split_digits, write_json, write_jsonl

QUESTION = "Read."
DIGITS = "0123456789"

INSTRUCTION = "Reply + or -."
"""Of the judge: the demo's tokenizer spells long texts byte by byte."""


@dataclass(frozen=True, kw_only=True)
class ReadingAmounts:
    """How much to make."""

    seed: int = 0
    length: int = 3
    """Digits on a picture."""
    mistaken_share: float = 0.1
    """Of the digits in solutions for fine-tuning, as collected answers have mistakes: a model that is always sure of itself draws
    the same answer eight times."""
    seen_share: float = 0.15
    """Of all digits: those that the model that answers has seen."""
    heldout_share: float = 0.2
    """Of all digits; nothing is trained on them."""
    num_sft: int = 2000
    num_texts: int = 3000
    num_pairs: int = 1000
    num_digits: int = 6000
    num_readings: int = 3000
    num_places: int = 5000
    num_solutions: int = 5000
    num_verdicts: int = 5000
    num_heldout: int = 1000


def solution(digits: str) -> str:
    """A number, read a digit a step. A number behind the steps would be read off the picture again, and differ from them."""
    steps = "\n\n".join(step(place, digit) for place, digit in enumerate(digits, 1))
    return f"\\boxed{{{steps}}}"


def known_answer(digits: str) -> str:
    """What a right solution comes to (`evaluate/final_answer.py`)."""
    return " ".join(step(place, digit) for place, digit in enumerate(digits, 1))


def step(place: int, digit: str) -> str:
    """What is said to stand at a place, counted from 1."""
    return f"{place}: {digit}"


def comparison(shown: str, said: str) -> str:
    """Of digits: `+` the same, `-` the shown one is smaller, `>` it is larger."""
    return ">" if shown > said else verdict(shown, said)


def verdict(shown: str, said: str) -> str:
    """`+` the same, `-` not."""
    return GOOD if shown == said else BAD


def prepare_readings(out: Path, amounts: ReadingAmounts, pretraining: Amounts) -> None:
    """Make `out`, or leave it alone if it was made with the same amounts.

    Args:
        out: folder.
        amounts: of what is made here.
        pretraining: of the demo's data; their `heldout_share` is not looked at.
    """
    made = {"readings": asdict(amounts), "pretraining": asdict(pretraining)}
    marker = out / "amounts.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == made:
        return
    (out / "images").mkdir(parents=True, exist_ok=True)
    for name, share in (("policy", 1 - amounts.seen_share), ("judge", amounts.heldout_share)):
        prepare(out / name, amounts.seed, replace(pretraining, heldout_share=share))
    policy_digits, _ = split_digits(random.Random(amounts.seed), 1 - amounts.seen_share)
    judge_digits, heldout = split_digits(random.Random(amounts.seed), amounts.heldout_share)
    rng = random.Random(f"readings {amounts.seed}")
    pictures = draw_pictures(out, "sft", policy_digits, amounts.length, amounts.num_sft, rng)
    sets = {
        "sft": [_about(path, [(QUESTION, solution(_mistaken(shown, amounts, rng)))]) for path, shown in pictures],
        "texts": [_text_readings(amounts, rng) for _ in range(amounts.num_texts)],
        **_Lessons(out, judge_digits, amounts, rng).all(),
    }
    for name, records in sets.items():
        write_jsonl(out / f"{name}.jsonl", records)
    for meta, names in (
        ("sft", ["sft", "texts"]),
        ("digits", ["pairs", "digits", "readings"]),
        ("places", ["pairs", "digits", "readings", "places"]),
        ("solutions", ["solutions"]),
        ("verdicts", ["verdicts"]),
    ):
        entry = {"root": "", "repeat_time": 1, "data_augment": False}
        write_json(out / f"{meta}_meta.json", {name: {**entry, "annotation": f"{name}.jsonl"} for name in names})
    pictures = draw_pictures(out, "heldout", heldout, amounts.length, amounts.num_heldout, rng)
    write_jsonl(out / "heldout_questions.jsonl", questions_about("heldout", pictures, QUESTION, known_answer))
    write_json(marker, made)


class _Lessons:
    """Conversations for the judge."""

    def __init__(self, out: Path, digits: Sequence[Digit], amounts: ReadingAmounts, rng: random.Random) -> None:
        self._out = out
        self._digits = digits
        self._amounts = amounts
        self._rng = rng

    def all(self) -> dict[str, list[Record]]:
        """By data set."""
        amounts, length = self._amounts, self._amounts.length
        single = self._draw("digit", amounts.num_digits, 1, 1)
        read = self._draw("reading", amounts.num_readings, 1, length)
        several = self._draw("place", amounts.num_places, length, length)
        solved = self._draw("solution", amounts.num_solutions, length, length)
        judged = self._draw("verdict", amounts.num_verdicts, length, length)
        return {
            "pairs": [_conversation([self._pair() for _ in range(12)]) for _ in range(amounts.num_pairs)],
            "digits": [_about(path, self._claims(shown, 3)) for path, shown in single],
            "readings": [_about(path, [(QUESTION, solution(shown))]) for path, shown in read],
            "places": [_about(path, self._claims(shown, 12)) for path, shown in several],
            "solutions": [self._judged(*drawn, comparison) for drawn in solved],
            "verdicts": [self._judged(*drawn, verdict) for drawn in judged],
        }

    def _draw(self, name: str, count: int, shortest: int, longest: int) -> Iterable[Picture]:
        """Pictures of random lengths, each written when it is its turn."""
        for index in range(count):
            length = self._rng.randint(shortest, longest)
            yield draw_picture(self._out, f"{name}-{index:05d}", self._digits, length, self._rng)

    def _compared(self, digit: str) -> tuple[str, str]:
        """What is said of a digit, and the answer."""
        said = digit if self._rng.random() < 0.4 else _other(digit, self._rng)
        return said, comparison(digit, said)

    def _pair(self) -> tuple[str, str]:
        digit = self._rng.choice(DIGITS)
        said, answer = self._compared(digit)
        return f"{digit} {said}", answer

    def _claims(self, shown: str, count: int) -> list[tuple[str, str]]:
        turns = []
        for _ in range(count):
            place = self._rng.randrange(len(shown))
            said, answer = self._compared(shown[place])
            turns.append((step(place + 1, said), answer))
        return turns

    def _judged(self, path: str, shown: str, answer: Callable[[str, str], str]) -> Record:
        """A solution, right or wrong, with the answer to every step: does what it says stand there?"""
        said = list(shown)
        while self._rng.random() < 0.6:
            place = self._rng.randrange(len(said))
            said[place] = _other(said[place], self._rng)
        steps = split_steps(solution("".join(said)), len(said))
        turns = judged_turns(f"<image>\n{QUESTION}", steps)
        return {"image": path, **_conversation(zip(turns, map(answer, shown, said), strict=True), INSTRUCTION)}


def _other(digit: str, rng: random.Random) -> str:
    return rng.choice(DIGITS.replace(digit, ""))


def _mistaken(digits: str, amounts: ReadingAmounts, rng: random.Random) -> str:
    return "".join(_other(digit, rng) if rng.random() < amounts.mistaken_share else digit for digit in digits)


def _text_readings(amounts: ReadingAmounts, rng: random.Random) -> Record:
    """Numbers that need not be read off a picture."""
    numbers = ["".join(rng.choices(DIGITS, k=amounts.length)) for _ in range(4)]
    return _conversation([(f"{number} {QUESTION}", solution(_mistaken(number, amounts, rng))) for number in numbers])


def _about(path: str, turns: Sequence[tuple[str, str]]) -> Record:
    (first, answer), *others = turns
    return {"image": path, **_conversation([(f"<image>\n{first}", answer), *others])}


def _conversation(turns: Iterable[tuple[str, str]], instruction: str | None = None) -> Record:
    system = [] if instruction is None else [{"from": "system", "value": instruction}]
    said = [{"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)]
    return {"conversations": [*system, *said]}
