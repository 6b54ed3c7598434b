"""`evaluate` on a small random model: every benchmark in the files of its data set, killed, resumed, on several ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkpoint_convert.__main__ import main as convert
from internvl_megatron.__main__ import main
from internvl_megatron.evaluate.benchmarks.registry import BENCHMARKS, chosen_options
from tests.support.miniature_benchmarks import picture_bytes, write_all
from tests.support.random_chat import write_random_chat

pytestmark = pytest.mark.parallel

ROOT = Path(__file__).resolve().parents[2]
SOME = ("mmstar", "mmmu", "mmbench", "chartqa", "pope", "mvbench", "mmlu")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """`hf`, a checkpoint; `weights`, converted; `data`, all benchmarks."""
    root = tmp_path_factory.mktemp("benchmarks")
    write_all(root / "data")
    write_random_chat(root / "hf", seed=1)
    assert convert(["hf-to-megatron", str(root / "hf"), str(root / "weights")]) == 0
    return root


@pytest.fixture(scope="module")
def evaluated(made) -> Path:
    """Results of all benchmarks on one rank."""
    assert main(arguments(made, made / "all", BENCHMARKS)) == 0
    return made / "all"


def arguments(made, output, benchmarks, *more, model="hf"):
    parts = [
        "evaluate",
        "--checkpoint",
        made / model,
        "--data",
        made / "data",
        "--output",
        output,
        "--benchmark",
        *benchmarks,
    ]
    return [str(part) for part in [*parts, "--max-new-tokens", "7", "--max-positions", "4096", *more]]


def answers(folder):
    """Lines of all answer files of a benchmark."""
    return [
        json.loads(line) for path in sorted(folder.glob("answers/*.jsonl")) for line in path.read_text().splitlines()
    ]


def outcome(output, benchmark):
    """Answers by the key of what was asked, and scores."""
    result = json.loads((output / benchmark / "result.json").read_text())
    return {line["key"]: line["answer"] for line in answers(output / benchmark)}, result["scores"]


def test_every_benchmark(made, evaluated):
    results = {result["benchmark"]: result for result in json.loads((evaluated / "results.json").read_text())}
    assert results.keys() == BENCHMARKS.keys()
    for name, benchmark in BENCHMARKS.items():
        items = benchmark.read(made / "data" / name, chosen_options(benchmark, ()))
        lines = answers(evaluated / name)
        assert {line["question"] for line in lines} == {item.question for item in items}
        assert len({line["key"] for line in lines}) == len(lines), (
            "the same question about the same picture is asked once"
        )
        assert results[name]["num_questions"] == results[name]["num_all_questions"] == len(items)
        assert results[name]["published"] is None, "it has none of the published sizes"
    given = {line["answer"] for name in BENCHMARKS for line in answers(evaluated / name)}
    assert len(given) > 10, "the random model answers everything alike"
    table = (evaluated / "results.md").read_text().splitlines()
    assert len(table) == 4 + len(BENCHMARKS)


def test_four_replicas_and_converted_weights_answer_the_same(made, evaluated, tmp_path):
    assert main(arguments(made, tmp_path / "four", SOME, "--nproc", "4", model="weights")) == 0
    for name in SOME:
        assert outcome(tmp_path / "four", name) == outcome(evaluated, name)
    assert [
        len(answers_of.read_text().splitlines())
        for answers_of in sorted((tmp_path / "four/mvbench/answers").iterdir())
    ] == [5] * 4


def test_what_is_cut_off_is_asked_again_and_nothing_else(made, evaluated, tmp_path):
    """Half of the answers are lost, one in the middle of its line, and one is another's now; two replicas go on."""
    output = tmp_path / "again"
    shutil.copytree(evaluated / "mvbench", output / "mvbench")
    path = output / "mvbench/answers/00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:10]) + lines[10][:25])
    assert main(arguments(made, output, ["mvbench"], "--nproc", "2")) == 0
    assert outcome(output, "mvbench") == outcome(evaluated, "mvbench")
    assert path.read_bytes().startswith(b"".join(lines[:10]))
    assert len(answers(output / "mvbench")) == 20


@pytest.mark.slow
def test_answers_are_used_again_for_the_same_question_alone(made, evaluated, tmp_path, capsys):
    """A changed setting, picture, checkpoint or table asks again; another way to score does not."""
    output, data = tmp_path / "out", tmp_path / "made"
    shutil.copytree(made / "data" / "chartqa", data / "data" / "chartqa")
    for name in ("hf", "weights"):
        (data / name).symlink_to(made / name)

    def asked(*more, model="hf"):
        before = len(answers(output / "chartqa"))
        assert main(arguments(data, output, ["chartqa"], *more, model=model)) == 0, capsys.readouterr().err
        return len(answers(output / "chartqa")) - before

    assert asked() == 4
    assert asked(model="weights") == 0, "the same weights in other files"
    assert asked("--option", "chartqa.tolerance_of=answer") == 0
    assert asked("--limit", "3") == 0
    assert asked("--max-new-tokens", "6") == 4
    assert asked("--v2pe-numerator", "64") == 4
    questions = json.loads((data / "data/chartqa/test/test_human.json").read_text())
    questions[0]["query"] = "how many digits?"
    (data / "data/chartqa/test/test_human.json").write_text(json.dumps(questions))
    assert asked() == 1, "one question is another now"
    (data / "data/chartqa/test/png/1.png").write_bytes(picture_bytes(9))
    assert asked() == 4
    write_random_chat(data / "other", seed=2)
    assert asked(model="other") == 4
    assert asked() == 0, "earlier ones are still there"


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(made, evaluated, tmp_path):
    """SIGKILL to the command when some answers are there; its ranks end with it."""
    output = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "internvl_megatron",
        *arguments(made, output, ["mme", "mvbench"], "--nproc", "2", "--max-sequences", "1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        while len(answers(output / "mme")) < 6:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.read()  # its ranks have the same: it ends with the last of them
    before = {line["key"] for line in answers(output / "mme")}
    assert 6 <= len(before) < 28
    assert main(arguments(made, output, ["mme", "mvbench"])) == 0
    assert len(answers(output / "mme")) == 28, "none is asked twice"
    for name in ("mme", "mvbench"):
        assert outcome(output, name) == outcome(evaluated, name)


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (lambda data: None, ["--benchmark", "mmstr"], "benchmark 'mmstr' is not known; there are mmmu,"),
        (lambda data: None, ["--option", "mmstar.mask=no"], "mmstar has no such option; it has none"),
        (lambda data: None, ["--option", "ai2d.mask=maybe"], "must be one of yes, no"),
        (lambda data: None, ["--limit", "0"], "limit: must be at least 1"),
        (lambda data: None, ["--max-new-tokens", "0"], "max_new_tokens: must be at least 1"),
        (lambda data: None, ["--benchmark", "mmstar", "mmstar"], "each at most once"),
        (lambda data: shutil.rmtree(data / "mmstar"), [], "mmstar: no such folder; docs/evaluation.md says"),
        (lambda data: (data / "mmstar/MMStar.tsv").unlink(), [], "MMStar.tsv: No such file"),
        (lambda data: edit(data, b"\tanswer\t", b"\tright\t"), [], "MMStar.tsv: has no column 'answer'; columns are index,"),
        (lambda data: edit(data, b"three digits\tnine\tA", b"three digits\tnine"), [], "MMStar.tsv:4: has 8 fields, the table 9"),
        (lambda data: edit(data, b"\tnine\tA\t", b"\tnine\tE\t"), [], "MMStar.tsv:4: field 'answer': must be the letter of an"),
        (lambda data: edit(data, b"\n2\t", b"\n1\t"), [], "MMStar.tsv:4: the question '1' is at "),
        (lambda data: edit(data, b"\tiVBORw0KGgo", b"\tiVBORw0KGgp"), [], "MMStar.tsv:2: image "),
        (lambda data: edit(data, b"\tiVBORw0KGgo", b"\t****w0KGgo"), [], "MMStar.tsv:2: field 'image': is not base64"),
        (lambda data: None, ["--max-positions", "20"], "MMStar.tsv:2: "),
    ],
)  # fmt: skip
def test_wrong_input(made, tmp_path, capsys, change, more, message):
    root = tmp_path / "made"
    shutil.copytree(made / "data/mmstar", root / "data/mmstar")
    (root / "hf").symlink_to(made / "hf")
    change(root / "data")
    assert main(arguments(root, tmp_path / "out", ["mmstar"], *more)) == 2
    assert message in capsys.readouterr().err


def edit(data, old, new):
    """Change the table once."""
    path = data / "mmstar/MMStar.tsv"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))


def test_an_output_that_cannot_be_written(made, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert main(arguments(made, tmp_path / "out", ["mmstar"])) == 2
    assert "choose another --output" in capsys.readouterr().err
