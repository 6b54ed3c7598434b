"""`generate`, `score` and `best-of-n` by command line, on converted weights of small random models."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from checkpoint_convert.__main__ import main as convert
from internvl_megatron.__main__ import main
from tests.support.random_chat import write_random_chat

pytestmark = pytest.mark.parallel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`one` and `two`: weights of models of different sizes; a picture; a file of prompts and one of questions."""
    root = tmp_path_factory.mktemp("commands")
    for name, seed, width in (("one", 1, 96), ("two", 2, 128)):
        source = write_random_chat(root / f"{name}-hf", seed, width)
        assert convert(["hf-to-megatron", str(source), str(root / name)]) == 0
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (28, 28, 3), np.uint8)).save(root / "picture.png")
    (root / "broken.png").write_bytes(b"\x89PNG nothing")
    lines = [{"question": "how many?", "image": "picture.png"}, {"question": "two?", "system": ""}]
    (root / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    questions = [
        {"id": n, "image": "picture.png", "question": "how many?", "answer": str(n), "task": "t", "chance": 0.1}
        for n in range(3)
    ]
    (root / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))
    return root


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    out = capsys.readouterr()
    assert code == 0, out.err
    return out.out


def test_generate(made, capsys):
    asked = ["generate", made / "one", "how many?", "--image", made / "picture.png", "--max-new-tokens", 6]
    greedy = run(capsys, *asked)
    assert run(capsys, *asked, "--tensor-size", 2) == greedy
    assert run(capsys, "generate", made / "one-hf", *asked[2:]) == greedy, "a Hugging Face checkpoint as it is"
    drawn = run(capsys, *asked, "--temperature", 3, "--seed", 5)
    assert drawn != greedy
    lines = run(
        capsys, "generate", made / "one", "--prompts", made / "prompts.jsonl", "--max-new-tokens", 6
    ).splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 2
    assert answers[0] + "\n" == greedy


@pytest.mark.slow
def test_streaming(made):
    """In a process of its own: ranks write to the standard output themselves."""
    command = [
        sys.executable,
        "-m",
        "internvl_megatron",
        "generate",
        str(made / "one"),
        "how many?",
        "--max-new-tokens",
        "9",
    ]
    command += ["--temperature", "2", "--device", "cpu"]
    whole, streamed = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for more in ([], ["--stream"])
    )
    assert streamed == whole
    assert len(whole) > 3


def test_score(made, capsys):
    asked = ["score", made / "one", "how many?", "--answer", "two", "--answer", "there are two", "--tokens"]
    lines = [line.split(maxsplit=1) for line in run(capsys, *asked).splitlines()]
    totals = [number for number, (_, text) in enumerate(lines) if not text.startswith(("'", '"'))]
    assert [lines[number][1] for number in totals] == ["two", "there are two"]
    for start, end in zip(totals, [*totals[1:], len(lines)], strict=True):
        assert float(lines[start][0]) == pytest.approx(
            sum(float(value) for value, _ in lines[start + 1 : end]), abs=1e-3
        )
        assert float(lines[start][0]) < math.log(0.5)


def test_best_of_n(made, capsys, tmp_path):
    common = ["best-of-n", made / "one", made / "two"]
    settings = ["-n", 3, "--max-new-tokens", 5, "--temperature", 2]
    answer = run(capsys, *common, "how many?", "--image", made / "picture.png", *settings)
    assert answer.endswith("\n")
    table = run(capsys, *common, "--questions", made / "questions.jsonl", "--output", tmp_path / "out", *settings)
    assert [line.split()[0] for line in table.splitlines()] == ["answers", "1", "2", "3"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    assert [len(line["answers"]) for line in lines] == [3, 3, 3]
    assert all(0 <= score <= 1 for line in lines for score in line["scores"])
    assert len({score for line in lines for score in line["scores"]}) > 2
    assert (tmp_path / "out" / "scaling.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "one"], "nothing is asked"),
        (["generate", "one", "x", "--prompts", "prompts.jsonl"], "--prompts brings its own"),
        (["generate", "one", "x", "--image", "broken.png"], "broken.png: cannot be read"),
        (["generate", "one", "x", "--image", "nowhere.png"], "nowhere.png: file not found"),
        (["generate", "one", "<image> <image>", "--image", "picture.png"], "2 <image> in the human turns but 1 image"),
        (["generate", "one", "x", "--max-positions", "20"], "the context has 20"),
        (["generate", "one", "x", "--temperature", "-1"], "temperature: must be 0"),
        (["generate", "one", "x", "--tensor-size", "3"], "tensor_size=3 must divide model.language.num_heads=4"),
        (["generate", "one", "x", "--nproc", "3", "--tensor-size", "2"], "do not divide the 3 ranks"),
        (["generate", "one", "x", "--pipeline-size", "9"], "the language model has 4 layers"),
        (["generate", "questions.jsonl", "x"], "questions.jsonl"),
        (["best-of-n", "one", "two", "x", "--temperature", "0"], "with 0 all answers are the same"),
        (["best-of-n", "one", "two", "--questions", "questions.jsonl"], "--questions and --output go together"),
    ],
)
def test_refused(made, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(made)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_weights_of_another_size(made, capsys, tmp_path):
    """The configuration of one model beside the weights of another."""
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for path in (made / "one").rglob("*"):
        target = mixed / path.relative_to(made / "one")
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif path.suffix == ".json" and path.parent == made / "one" and "index" not in path.name:
            target.write_bytes((made / "two" / path.name).read_bytes())
        else:
            target.write_bytes(path.read_bytes())
    assert main(["generate", str(mixed), "x"]) == 2
    assert "shape" in capsys.readouterr().err
