"""The demo's data: real digits, nothing held out is trained on, every answer is true, every run makes the same."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.prepare_demo import DIGIT_PIXELS, PAIR_TASKS, PICTURE_TASKS, Amounts, prepare

SMALL = Amounts(
    num_pictures=60,
    num_pairs=12,
    num_texts=20,
    num_heldout_pictures=30,
    num_heldout_pairs=15,
    num_heldout_texts=5,
    questions_per_task=12,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "data"
    prepare(out, seed=0, amounts=SMALL)
    return out


@pytest.fixture(scope="module")
def digit_of():
    """The digit of a 28 x 28 piece of a picture, looked up among scikit-learn's bitmaps enlarged here."""
    from sklearn.datasets import load_digits

    bitmaps, labels = load_digits(return_X_y=True)
    pieces = [Image.fromarray((bitmap.reshape(8, 8) / 16 * 255).astype(np.uint8)) for bitmap in bitmaps]
    enlarged = [
        np.asarray(piece.resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC)).tobytes() for piece in pieces
    ]
    return dict(zip(enlarged, map(str, labels), strict=True))


def pieces_of(path: Path) -> list[bytes]:
    pixels = np.asarray(Image.open(path))
    assert pixels.shape[0] == DIGIT_PIXELS
    return [piece.tobytes() for piece in np.split(pixels, pixels.shape[1] // DIGIT_PIXELS, axis=1)]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts_of(records: list[dict]) -> set[str]:
    values = [turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "human"]
    return {value.rpartition("\n")[2] for value in values}


def test_pictures_are_real_digits_and_none_is_in_both_splits(demo, digit_of):
    train = {piece for path in (demo / "images/train").iterdir() for piece in pieces_of(path)}
    heldout = {piece for path in (demo / "images/heldout").iterdir() for piece in pieces_of(path)}
    assert train and heldout and train | heldout <= set(digit_of)
    assert not train & heldout


def test_no_held_out_fact_is_trained_on(demo):
    asked = {q["question"] for q in read_jsonl(demo / "heldout_questions.jsonl") if q["task"].startswith("text_")}
    assert asked and not asked & facts_of(read_jsonl(demo / "train_facts.jsonl"))


def expected_answer(question: str, digits: list[str]) -> str:
    """The answer to a question about pictures, worked out from their digits."""
    of = digits[1] if question.endswith("image 2?") else digits[0]
    found = {
        "Read": of,
        "How many": str(len(of)),
        "First": of[0],
        "Last": of[-1],
        "Largest": max(of),
        "Even or odd": ("even", "odd")[int(of[-1]) % 2],
    }
    return next(answer for start, answer in found.items() if question.startswith(start))


def test_answers_about_pictures_are_true_and_their_order_varies(demo, digit_of):
    records = [r for name in ("digits", "pairs") for r in read_jsonl(demo / f"train_{name}.jsonl")]
    first_questions = set()
    for record in records:
        paths = [record["image"]] if isinstance(record["image"], str) else record["image"]
        digits = ["".join(digit_of[piece] for piece in pieces_of(demo / path)) for path in paths]
        turns = record["conversations"]
        assert "".join(turn["value"] for turn in turns).count("<image>") == len(paths)
        for human, answer in zip(turns[::2], turns[1::2], strict=True):
            question = human["value"].rpartition("\n")[2]
            assert answer["value"] == expected_answer(question, digits), (record["id"], question, digits)
        first_questions.add(turns[0]["value"])
    assert len(first_questions) == len(PICTURE_TASKS) + sum(map(len, PAIR_TASKS.values()))


def test_every_task_is_asked_with_its_chance(demo):
    questions = read_jsonl(demo / "heldout_questions.jsonl")
    tasks = Counter(question["task"] for question in questions)
    assert set(PICTURE_TASKS) | set(PAIR_TASKS) < set(tasks) and set(tasks.values()) == {SMALL.questions_per_task}
    for task in tasks:
        rows = [question for question in questions if question["task"] == task]
        majority = Counter(row["answer"] for row in rows).most_common(1)[0][1] / len(rows)
        assert {row["chance"] for row in rows} == {max(majority, 0.5) if " or " in rows[0]["question"] else majority}


def test_the_trainer_reads_it_and_cuts_a_tile_per_digit(demo):
    from internvl_megatron.data.dataset import load_datasets
    from internvl_megatron.data.tiling import choose_grid
    from internvl_megatron.data.tokenizer import load_tokenizer

    datasets = {dataset.entry.name: dataset for dataset in load_datasets(demo / "train_meta.json")}
    assert {name: dataset.length for name, dataset in datasets.items()} == {"digits": 60, "pairs": 12, "facts": 20}
    tokenizer = load_tokenizer(demo / "tokenizer")
    assert len(tokenizer) <= SMALL.vocab_size
    for name, images in (("digits", 1), ("pairs", 2)):
        max_tiles = datasets[name].entry.max_tiles
        assert max_tiles is not None and max_tiles == 3 * images
        for num_digits in (1, 2, 3):
            grid = choose_grid(num_digits * DIGIT_PIXELS, DIGIT_PIXELS, 1, max_tiles // images, DIGIT_PIXELS)
            assert grid == (num_digits, 1)
    record = datasets["digits"].file.read(0)
    for turn in record["conversations"]:
        assert tokenizer.decode(tokenizer.encode(turn["value"])) == turn["value"]


def test_the_same_seed_makes_the_same_files_and_a_finished_folder_is_kept(demo, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    prepare(again, seed=0, amounts=SMALL)
    # Reading the data adds indices, which another test does.
    files = sorted(path.relative_to(demo) for path in demo.rglob("*") if path.is_file() and path.suffix != ".index")
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((demo / name).read_bytes() == (again / name).read_bytes() for name in files)

    made = (again / "recipe.json").stat().st_mtime_ns
    prepare(again, seed=0, amounts=SMALL)
    assert (again / "recipe.json").stat().st_mtime_ns == made
    prepare(again, seed=1, amounts=SMALL)
    assert (again / "train_digits.jsonl").read_bytes() != (demo / "train_digits.jsonl").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]

    other.mkdir()
    (other / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="not made by this tool"):
        prepare(other, seed=0, amounts=SMALL)
    assert (other / "mine.txt").exists()
