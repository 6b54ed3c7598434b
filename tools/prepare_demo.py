"""Prepare the demo's data: real handwritten digits, questions about them, and a tokenizer for both.

    python tools/prepare_demo.py OUT [--seed N]

A picture is one to three digits of scikit-learn's `load_digits` side by side, 28 pixels each, so that tiles of 28 pixels
hold one digit each. The 1,797 digits are split first: no digit seen in a held-out picture is in any training picture,
and no fact asked in a held-out text question is in any training text. OUT holds, in InternVL's formats:

    train_meta.json, heldout_meta.json    data sets `digits` (one picture), `pairs` (two) and `facts` (text only)
    heldout_questions.jsonl               {id, [image], question, answer, task, chance}, each to be asked alone
    images/, *.jsonl, tokenizer/          pictures, conversations, a small Hugging Face tokenizer
    recipe.json                           what OUT was made from; a finished OUT of the same recipe is left alone

`question` is a human turn as it stands in training, `<image>` included. `chance` is the share of right answers of the
best constant answer to that task, or of a guess where the question offers two answers.
"""

import argparse
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl_megatron.data import tokenizer_build

Record = dict[str, Any]
Fact = tuple[str, str]
"""A question and its answer."""

Digit = tuple[str, np.ndarray]
"""A digit and its picture, uint8 [28, 28]."""

DIGIT_PIXELS = 28
MAX_DIGITS = 3
FACTS_PER_TEXT = 4
QUESTIONS_PER_SINGLE_DIGIT = 3
"""Of the six about a picture: with one digit on it most of the others would be copies of the first answer."""
RECIPE_FILE = "recipe.json"

PICTURE_TASKS: dict[str, tuple[str, Callable[[str], str]]] = {
    "read": ("Read the number.", lambda digits: digits),
    "count": ("How many digits?", lambda digits: str(len(digits))),
    "first": ("First digit?", lambda digits: digits[0]),
    "last": ("Last digit?", lambda digits: digits[-1]),
    "largest": ("Largest digit?", max),
    "parity": ("Even or odd?", lambda digits: parity(int(digits))),
}

PAIR_TASKS: dict[str, tuple[tuple[str, Callable[[str, str], str]], ...]] = {
    "pair_count": (
        ("How many digits in image 1?", lambda one, two: str(len(one))),
        ("How many digits in image 2?", lambda one, two: str(len(two))),
    ),
    "pair_first": (
        ("First digit in image 1?", lambda one, two: one[0]),
        ("First digit in image 2?", lambda one, two: two[0]),
    ),
}

TWO_CHOICES = {"parity", "text_parity"}


@dataclass(frozen=True, kw_only=True)
class Amounts:
    """How much to make."""

    num_pictures: int = 3500
    num_pairs: int = 1200
    num_texts: int = 1300
    num_heldout_pictures: int = 300
    num_heldout_pairs: int = 150
    num_heldout_texts: int = 100
    questions_per_task: int = 100
    vocab_size: int = 400
    heldout_share: float = 0.2
    """Of the 1,797 digits; only held-out pictures show them."""


@dataclass(frozen=True)
class Picture:
    """A written picture: its path, relative to OUT, and the digits on it."""

    path: str
    digits: str


def parity(number: int) -> str:
    """Even or odd."""
    return "odd" if number % 2 else "even"


def prepare(out: Path, seed: int = 0, amounts: Amounts | None = None) -> None:
    """Make `out`, or leave it alone if it was made by the same recipe. It appears complete or not at all.

    Raises:
        FileExistsError: `out` is there and was not made by this tool.
    """
    amounts = amounts or Amounts()
    recipe = {"fingerprint": _fingerprint(), "seed": seed, **asdict(amounts)}
    recorded = out / RECIPE_FILE
    if recorded.is_file() and json.loads(recorded.read_text(encoding="utf-8")) == recipe:
        return
    if out.exists() and any(out.iterdir()) and not recorded.is_file():
        raise FileExistsError(f"{out} is not empty and was not made by this tool; name another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
    partial.mkdir(parents=True)
    _build(partial, random.Random(seed), amounts)
    write_json(partial / RECIPE_FILE, recipe)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _fingerprint() -> str:
    """Digest of the code that decides what is made."""
    sources = (Path(__file__), Path(tokenizer_build.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def _build(out: Path, rng: random.Random, amounts: Amounts) -> None:
    """Write everything but the recipe."""
    train_digits, heldout_digits = split_digits(rng, amounts.heldout_share)
    train_facts, heldout_facts = _split_facts(rng, amounts.questions_per_task)
    pictures = _draw_pictures(out, "train", train_digits, amounts.num_pictures, rng)
    pairs = [(rng.choice(pictures), rng.choice(pictures)) for _ in range(amounts.num_pairs)]
    train = {
        "digits": [_picture_record(picture, rng) for picture in pictures],
        "pairs": [_pair_record(*pair, rng) for pair in pairs],
        "facts": [_text_record(train_facts, rng) for _ in range(amounts.num_texts)],
    }
    _write_datasets(out, "train", train)

    pictures = _draw_pictures(out, "heldout", heldout_digits, amounts.num_heldout_pictures, rng)
    pairs = [(rng.choice(pictures), rng.choice(pictures)) for _ in range(amounts.num_heldout_pairs)]
    heldout = {
        "digits": [_picture_record(picture, rng) for picture in pictures],
        "pairs": [_pair_record(*pair, rng) for pair in pairs],
        "facts": [_text_record(heldout_facts, rng) for _ in range(amounts.num_heldout_texts)],
    }
    _write_datasets(out, "heldout", heldout)
    write_jsonl(out / "heldout_questions.jsonl", _questions(pictures, pairs, heldout_facts, rng, amounts))

    texts = [
        turn["value"].replace("<image>", "")
        for records in train.values()
        for r in records
        for turn in r["conversations"]
    ]
    headers = ["system\n", "user\n", "assistant\n", "\n"]
    tokenizer_build.train_small_tokenizer([*texts, *headers], amounts.vocab_size).save_pretrained(
        str(out / "tokenizer")
    )


def split_digits(rng: random.Random, heldout_share: float) -> tuple[list[Digit], list[Digit]]:
    """All pictures of `load_digits`: those to train on and those held out. Nothing is drawn from `rng` before."""
    from sklearn.datasets import load_digits

    bitmaps, labels = load_digits(return_X_y=True)
    tiles = [(str(label), _enlarge(bitmap.reshape(8, 8))) for bitmap, label in zip(bitmaps, labels, strict=True)]
    rng.shuffle(tiles)
    num_heldout = round(len(tiles) * heldout_share)
    return tiles[num_heldout:], tiles[:num_heldout]


def _enlarge(bitmap: np.ndarray) -> np.ndarray:
    """Bring an 8 x 8 bitmap of values 0..16 to the size of a tile and to 0..255."""
    image = Image.fromarray((bitmap * (255 / 16)).astype(np.uint8))
    return np.asarray(image.resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC))


def _draw_pictures(out: Path, split: str, digits: Sequence[Digit], count: int, rng: random.Random) -> list[Picture]:
    """Write pictures of one to three random digits, as many of each length."""
    (out / "images" / split).mkdir(parents=True)
    pictures = []
    for index in range(count):
        chosen = rng.choices(digits, k=index % MAX_DIGITS + 1)
        picture = Picture(f"images/{split}/{index:05d}.png", "".join(label for label, _ in chosen))
        Image.fromarray(np.hstack([tile for _, tile in chosen])).save(out / picture.path)
        pictures.append(picture)
    return pictures


def _split_facts(rng: random.Random, num_heldout: int) -> tuple[dict[str, list[Fact]], dict[str, list[Fact]]]:
    """Facts about numbers by task: those to train on and those held out."""
    facts: dict[str, list[Fact]] = {
        "text_next": [(f"What comes after {n}?", str(n + 1)) for n in range(999)],
        "text_parity": [(f"Is {n} even or odd?", parity(n)) for n in range(1000)],
        "text_first": [(f"First digit of {n}?", str(n)[0]) for n in range(10, 1000)],
    }
    for known in facts.values():
        rng.shuffle(known)
    train = {task: known[num_heldout:] for task, known in facts.items()}
    return train, {task: known[:num_heldout] for task, known in facts.items()}


def _picture_facts(picture: Picture) -> list[Fact]:
    return [(question, answer(picture.digits)) for question, answer in PICTURE_TASKS.values()]


def _pair_facts(one: Picture, two: Picture, task: str) -> list[Fact]:
    return [(question, answer(one.digits, two.digits)) for question, answer in PAIR_TASKS[task]]


def _with_images(question: str, num_images: int) -> str:
    """The question as the first human turn of a conversation about so many images."""
    if num_images == 0:
        return question
    if num_images == 1:
        return f"<image>\n{question}"
    return "".join(f"Image-{number}: <image>\n" for number in range(1, num_images + 1)) + question


def _conversation(facts: Iterable[Fact], num_images: int) -> list[dict[str, str]]:
    """A question and its answer after the other; the images come first."""
    turns = []
    for question, answer in facts:
        opening = question if turns else _with_images(question, num_images)
        turns += [{"from": "human", "value": opening}, {"from": "gpt", "value": answer}]
    return turns


def _shuffled(facts: list[Fact], rng: random.Random) -> list[Fact]:
    """In a fixed order an answer would be copied from the one before it, never read from the picture."""
    return rng.sample(facts, len(facts))


def _picture_record(picture: Picture, rng: random.Random) -> Record:
    facts = _shuffled(_picture_facts(picture), rng)
    if len(picture.digits) == 1:
        facts = facts[:QUESTIONS_PER_SINGLE_DIGIT]
    return {"image": picture.path, "conversations": _conversation(facts, 1)}


def _pair_record(one: Picture, two: Picture, rng: random.Random) -> Record:
    facts = [fact for task in PAIR_TASKS for fact in _pair_facts(one, two, task)]
    return {"image": [one.path, two.path], "conversations": _conversation(_shuffled(facts, rng), 2)}


def _text_record(facts: dict[str, list[Fact]], rng: random.Random) -> Record:
    tasks = rng.choices(list(facts), k=FACTS_PER_TEXT)
    return {"conversations": _conversation([rng.choice(facts[task]) for task in tasks], 0)}


def _questions(
    pictures: list[Picture],
    pairs: list[tuple[Picture, Picture]],
    facts: dict[str, list[Fact]],
    rng: random.Random,
    amounts: Amounts,
) -> list[Record]:
    """Held-out questions of every task, each about random held-out pictures (or a held-out fact)."""
    count = amounts.questions_per_task
    asked: dict[str, list[Record]] = {}
    for task, (question, answer) in PICTURE_TASKS.items():
        asked[task] = [
            {"image": picture.path, "question": _with_images(question, 1), "answer": answer(picture.digits)}
            for picture in rng.sample(pictures, count)
        ]
    for task in PAIR_TASKS:
        asked[task] = []
        for one, two in rng.sample(pairs, count):
            question, answer = rng.choice(_pair_facts(one, two, task))
            asked[task].append(
                {"image": [one.path, two.path], "question": _with_images(question, 2), "answer": answer}
            )
    for task, known in facts.items():
        asked[task] = [{"question": question, "answer": answer} for question, answer in known]
    return [
        {"id": f"{task}-{index:03d}", **record, "task": task, "chance": _chance(task, records)}
        for task, records in asked.items()
        for index, record in enumerate(records)
    ]


def _chance(task: str, records: list[Record]) -> float:
    """Share of right answers of the best constant answer, or of a guess between the two the question offers."""
    counts = Counter(record["answer"] for record in records)
    return max(max(counts.values()) / len(records), 0.5 if task in TWO_CHOICES else 0.0)


def _write_datasets(out: Path, split: str, datasets: dict[str, list[Record]]) -> None:
    """One jsonl per data set and the meta file that lists them; its paths are relative to its folder."""
    max_tiles = {"digits": MAX_DIGITS, "pairs": 2 * MAX_DIGITS, "facts": 1}
    meta = {}
    for name, records in datasets.items():
        annotation = f"{split}_{name}.jsonl"
        write_jsonl(out / annotation, [{"id": f"{name}-{i:05d}", **record} for i, record in enumerate(records)])
        meta[name] = {
            "root": ".",
            "annotation": annotation,
            "data_augment": False,
            "repeat_time": 1,
            "length": len(records),
            "max_dynamic_patch": max_tiles[name],
        }
    write_json(out / f"{split}_meta.json", meta)


def write_json(path: Path, value: object) -> None:
    """One value, for people to read."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_jsonl(path: Path, records: Iterable[Record]) -> None:
    """A record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Prepare the demo's data.")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the pictures and the questions")
    arguments = parser.parse_args()
    prepare(arguments.out, arguments.seed)
    print(f"demo data: {arguments.out}")


if __name__ == "__main__":
    main()
