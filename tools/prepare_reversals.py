"""Prepare the data of the pipeline: handwritten numbers read backwards, step by step.

A picture is a few of the demo's digits side by side, and its answer reads them and turns them round, a step a paragraph:

    <image> Backwards?        37 / 7 / 73

The digits are in three parts that share none: those that pre-training (`tools.prepare_demo`) and fine-tuning show, those of
the questions that preference pairs and step labels are made of, and held-out ones. OUT holds

    demo/                                  the demo's data, of the first part, for pre-training; its tokenizer
    sft.jsonl, texts.jsonl, sft_meta.json  conversations of the first part, and numbers given as text
    preference_questions.jsonl, judge_questions.jsonl         of the second part: {id, image, question, answer}
    heldout_questions.jsonl, heldout_pair_questions.jsonl, heldout_judge_questions.jsonl     of the third
    images/
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.digit_questions import Picture, draw_pictures, questions_about
from tools.prepare_demo import Amounts, Digit, Record, prepare, split_digits, write_json, write_jsonl

QUESTION = "Backwards?"


@dataclass(frozen=True, kw_only=True)
class ReversalAmounts:
    """How much to make."""

    seed: int = 0
    digits_per_picture: int = 2
    unseen_share: float = 0.9
    """Of the digits; neither pre-training nor fine-tuning shows them."""
    heldout_share: float = 0.2
    """Of the digits, among the unseen ones; nothing is trained on them."""
    num_sft: int = 2400
    num_texts: int = 600
    """Conversations about numbers without a picture, for fine-tuning."""
    questions_per_text: int = 6
    num_preference: int = 1000
    num_judge: int = 1000
    num_heldout: int = 2000
    num_heldout_pairs: int = 500
    num_heldout_judge: int = 300


def solution(digits: str) -> str:
    """A number, and the steps to what it is backwards, one a paragraph."""
    backwards = digits[::-1]
    return "\n\n".join([digits, *(backwards[: count + 1] for count in range(len(digits)))])


def prepare_reversals(out: Path, amounts: ReversalAmounts, pretraining: Amounts) -> None:
    """Make `out`, or leave it alone if it was made with the same amounts."""
    made = {"reversals": asdict(amounts), "pretraining": asdict(pretraining)}
    marker = out / "amounts.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == made:
        return
    (out / "images").mkdir(parents=True, exist_ok=True)
    prepare(out / "demo", amounts.seed, pretraining)
    assert pretraining.heldout_share == amounts.unseen_share, "pre-training shows digits that are to be unseen"
    seen, unseen = split_digits(random.Random(amounts.seed), amounts.unseen_share)
    num_heldout = round(len(unseen) * amounts.heldout_share / amounts.unseen_share)
    heldout, practice = unseen[:num_heldout], unseen[num_heldout:]
    rng = random.Random(f"reversals {amounts.seed}")

    def draw(name: str, digits: Sequence[Digit], count: int) -> list[Picture]:
        return draw_pictures(out, name, digits, amounts.digits_per_picture, count, rng)

    turns = [
        (path, [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": solution(digits)}])
        for path, digits in draw("sft", seen, amounts.num_sft)
    ]
    write_jsonl(out / "sft.jsonl", [{"image": path, "conversations": said} for path, said in turns])
    texts = [_text(amounts, rng) for _ in range(amounts.num_texts)]
    write_jsonl(out / "texts.jsonl", texts)
    entry = {"root": "", "repeat_time": 1, "data_augment": False}
    names = {"pictures": "sft.jsonl", "texts": "texts.jsonl"}
    write_json(out / "sft_meta.json", {name: {**entry, "annotation": file} for name, file in names.items()})
    for name, digits, count in (
        ("preference", practice, amounts.num_preference),
        ("judge", practice, amounts.num_judge),
        ("heldout", heldout, amounts.num_heldout),
        ("heldout_pair", heldout, amounts.num_heldout_pairs),
        ("heldout_judge", heldout, amounts.num_heldout_judge),
    ):
        questions = questions_about(name, draw(name, digits, count), QUESTION, lambda shown: shown[::-1])
        write_jsonl(out / f"{name}_questions.jsonl", questions)
    write_json(marker, made)


def _text(amounts: ReversalAmounts, rng: random.Random) -> Record:
    """Numbers that need not be read off a picture."""
    turns = []
    for _ in range(amounts.questions_per_text):
        digits = "".join(rng.choices("0123456789", k=amounts.digits_per_picture))
        turns += [
            {"from": "human", "value": f"{digits} {QUESTION}"},
            {"from": "gpt", "value": solution(digits)},
        ]
    return {"conversations": turns}
