"""Benchmarks while a run trains: the scores are those of its checkpoint, and training does not notice."""

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.__main__ import main
from internvl_megatron.config.overrides import apply_overrides
from internvl_megatron.config.plan import plan
from internvl_megatron.config.recipes import demo_digits
from internvl_megatron.errors import ConfigError
from internvl_megatron.watching.metrics import METRICS_FILE, read_metrics
from tests.support.miniature_benchmarks import choice_rows, write_json_lines, write_tsv
from tests.support.small_runs import small_data, small_run_settings

pytestmark = pytest.mark.parallel


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data, a little of them, and two benchmarks."""
    root = tmp_path_factory.mktemp("live")
    write_tsv(root / "benchmarks/mmstar/MMStar.tsv", choice_rows(6))
    write_json_lines(
        root / "benchmarks/gsm8k/test.jsonl",
        [{"question": f"{n} and 2?", "answer": f"#### {n + 2}"} for n in range(4)],
    )
    return small_data(root / "demo")


def settings(data: Path, every: int) -> list[str]:
    """Of a run that asks benchmarks."""
    return [
        f"benchmarks.every_steps={every}",
        "benchmarks.names=mmstar,gsm8k",
        f"benchmarks.data={data.parent / 'benchmarks'}",
        "benchmarks.limit_answer_tokens=6",
        "benchmarks.limit_samples=5",
    ]


def train(data: Path, run: Path, *more: str) -> list[dict[str, Any]]:
    """Four steps of two tensor-parallel ranks that divide sequences too; the metrics."""
    layout = ["parallel.tensor_size=2", "parallel.sequence_parallel=true", "num_steps=4"]
    assert main(["train", "demo_digits", *small_run_settings(data, run), *layout, *more, "--nproc", "2"]) == 0
    return read_metrics(run / METRICS_FILE)


def lines(folder: Path) -> list[dict[str, str]]:
    """Answers, by question."""
    found = [
        json.loads(line) for path in sorted(folder.glob("answers/*.jsonl")) for line in path.read_text().splitlines()
    ]
    return sorted(found, key=lambda line: line["id"])


def test_scores_are_those_of_the_checkpoint(data, tmp_path):
    run, plain = tmp_path / "run", tmp_path / "plain"
    rows = train(data, run, *settings(data, 3))
    assert [sorted(row["benchmark_scores"]) for row in rows] == [[], [], ["gsm8k", "mmstar"], ["gsm8k", "mmstar"]]
    others = train(data, plain)
    assert [(row["loss"], row["grad_norm"]) for row in rows] == [(row["loss"], row["grad_norm"]) for row in others]
    asked = ["--benchmark", "mmstar", "gsm8k", "--limit", "5", "--max-new-tokens", "6", "--tensor-size", "2"]
    where = ["--checkpoint", str(run), "--data", str(data.parent / "benchmarks"), "--output", str(tmp_path / "out")]
    assert main(["evaluate", *where, *asked]) == 0
    live = run / "benchmarks" / "step-00000004"
    for name, count in (("mmstar", 5), ("gsm8k", 4)):
        assert len(lines(tmp_path / "out" / name)) == count
        assert lines(tmp_path / "out" / name) == lines(live / name), (
            "keys too: the same weights, settings and questions"
        )
        result = json.loads((tmp_path / "out" / name / "result.json").read_text())
        assert rows[-1]["benchmark_scores"][name] == result["scores"]["main"]
    earlier = lines(run / "benchmarks" / "step-00000003" / "mmstar")
    assert {line["key"] for line in earlier}.isdisjoint(line["key"] for line in lines(live / "mmstar"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["benchmarks.every_steps=2"], "name some"),
        (["benchmarks.every_steps=2", "benchmarks.names=mmstar"], "the folder of their data"),
        (["parallel.context_size=2"], "does not go with parallel.context_size=2"),
        (["parallel.vision_sharding=sharded"], "does not go with parallel.vision_sharding=sharded"),
    ],
)
def test_settings_that_do_not_go_together(data, tmp_path, more, message):
    given = [] if "benchmarks" in more[0] else settings(data, 2)
    config = apply_overrides(demo_digits(), [*small_run_settings(data, tmp_path), *given, *more])
    with pytest.raises(ConfigError, match=message):
        plan(config, 4)


def test_wrong_data_end_the_run_before_it_begins(data, tmp_path, capsys):
    wrong = [*settings(data, 2), "benchmarks.names=mmstr"]
    assert main(["train", "demo_digits", *small_run_settings(data, tmp_path), "num_steps=1", *wrong]) == 2
    assert "benchmark 'mmstr' is not known" in capsys.readouterr().err
