"""`benchmark gpu` and `profile_step` run, dry, through the code a GPU would take; cases that do not fit get smaller."""

import gzip
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from internvl_megatron.launcher import Failure, RankFailedError
from tools import benchmark_gpu
from tools.benchmark import main
from tools.benchmark_gpu import left_out, run_until_it_fits
from tools.gpu_cases import KEPT_TILES, Case, Setting
from tools.profile_step import main as profile

QUICK = ["--dry", "--steps", "1", "--warmup", "1"]


@pytest.mark.parallel
def test_a_dry_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "record.json"
    arguments = ["gpu", "step", *QUICK, "--sizes", "8B", "--precisions", "fp8_current", "--rows", "4096"]
    assert main([*arguments, "--layers", "2", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    (result,) = record["results"]
    assert (result["layers"], result["full_layers"], result["fp8"]["language"]) == (2, 4, "current")
    assert set(result["phase_seconds"]) == {"plan", "encode", "decode", "backprop", "update"}
    assert 0 < sum(result["phase_seconds"].values()) <= result["step_seconds"]
    assert len(result["losses"]) == 2
    assert record["versions"]["torch"]
    assert "| 8B fp8_current 4K | 2 of 4 |" in capsys.readouterr().out


@pytest.mark.parallel
def test_a_dry_vision_encoder(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    arguments = ["gpu", "vision", *QUICK, "--encoders", "6B", "--precisions", "fp8_current", "--output", str(output)]
    assert main(arguments) == 0
    (result,) = json.loads(output.read_text())["results"]
    (chunk,) = result["chunks"]
    assert chunk["tiles"] == 16
    assert min(chunk["forward_seconds"], chunk["forward_backward_seconds"]) > 0


@pytest.mark.slow
@pytest.mark.parallel
def test_a_dry_baseline(tmp_path: Path) -> None:
    output = tmp_path / "record.json"
    assert main(["gpu", "hf", *QUICK, "--sizes", "1B", "--rows", "4096", "--output", str(output)]) == 0
    (result,) = json.loads(output.read_text())["results"]
    best = max(found["samples_per_second"] for found in result["baselines"])
    assert result["samples_per_second_over_best_baseline"] == pytest.approx(result["samples_per_second"] / best)


@pytest.mark.parallel
def test_a_profile_on_the_cpu(tmp_path: Path) -> None:
    settings = ["parallel.tensor_size=1", "parallel.pipeline_size=1", "eval_every_steps=null", "rows_per_step=1"]
    settings += ["data.eval_meta=null", "data.tokens_per_row=64", "data.tiles_per_row=16"]
    arguments = ["--drawn-rows", "demo_digits", *settings, "--warmup", "1", "--steps", "1", "--output", str(tmp_path)]
    assert profile(arguments) == 0
    record = json.loads((tmp_path / "profile.json").read_text())
    phases = record["seconds_by_phase"]
    assert phases["decode"]["gemm"] > 0
    assert phases["encode"]["attention"] > 0
    assert set(phases) >= {"plan", "encode", "decode", "backprop", "update"}
    assert 0 <= record["idle_seconds"] < record["step_seconds"]
    with gzip.open(tmp_path / "trace.json.gz", "rt") as file:
        assert json.load(file)["traceEvents"]


def test_a_case_that_does_not_fit_gets_fewer_layers() -> None:
    tried = []

    def measure(case: Case) -> dict[str, int]:
        tried.append(case.num_layers)
        if case.num_layers > 9:
            raise RankFailedError([Failure(0, 0.0, "torch.OutOfMemoryError: CUDA out of memory")])
        return {"found": case.num_layers}

    found, case = run_until_it_fits(Case("8B", "bf16", 4096, 20), measure)
    assert tried == [20, 15, 11, 8]
    assert found == {"found": 8}
    assert case.num_layers == 8


def test_other_failures_are_reported_and_end_the_case() -> None:
    def measure(_: Case) -> dict[str, int]:
        raise RankFailedError([Failure(0, 0.0, "ValueError: something else")])

    found, case = run_until_it_fits(Case("8B", "bf16", 4096, 20), measure)
    assert "something else" in found["failure"]
    assert case.num_layers == 20


def test_fp8_without_transformer_engine_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_gpu, "is_installed", lambda _: False)
    assert left_out(["bf16", "fp8_current"], is_dry=False) == {"fp8_current": "Transformer Engine is not installed"}
    assert left_out(["bf16", "fp8_current"], is_dry=True) == {}


def test_layers_follow_the_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_gpu, "query_gpu", lambda: {"memory_bytes": 80 * 2**30})
    options = Namespace(dry=False, layers=None, set=[], way=None)
    case = benchmark_gpu.cut_case("8B", "bf16", 16384, options)
    assert 4 <= case.num_layers < 28
    wanted = benchmark_gpu.cut_case("8B", "bf16", 4096, Namespace(dry=False, layers=None, set=[], way="bf16-none-16"))
    assert wanted.way == KEPT_TILES
    assert wanted.num_layers == 9


def test_a_baseline_that_is_cut_short_leaves_what_it_has_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ours, then one setting that needs its activations computed again, then the end of the part's time."""
    output, seen = tmp_path / "record.json", list[dict[str, Any]]()
    rate = {"peak_flops_per_second": 1e12}
    ours = {"name": "case", "layers": 2, "full_layers": 2, "samples_per_second": 8.0, **rate}
    monkeypatch.setattr(benchmark_gpu, "step_result", lambda *_: ours)
    monkeypatch.setattr(benchmark_gpu, "speed", lambda *_: {"samples_per_second": 4.0})
    settings = [Setting("packed", "torch_varlen"), Setting("padded", "sdpa")]
    monkeypatch.setattr(benchmark_gpu, "baseline_settings", lambda: settings)

    def launch(_body: str, _ranks: int, _config: Any, _rows: Any, setting: Setting, *_: Any, **__: Any) -> list[Any]:
        seen.extend(json.loads(output.read_text())["results"])
        if setting == settings[0]:
            raise RankFailedError([Failure(0, 0.0, "torch.OutOfMemoryError: CUDA out of memory")])
        if setting == settings[1]:
            raise KeyboardInterrupt
        return [{"step_seconds": 1.0}]

    monkeypatch.setattr(benchmark_gpu, "launch", launch)
    with pytest.raises(KeyboardInterrupt):
        main(["gpu", "hf", *QUICK, "--sizes", "1B", "--rows", "4096", "--output", str(output)])
    assert [len(result["baselines"]) for result in seen] == [0, 1, 2]
    assert seen[0]["baselines_not_run"] == ["packed, torch_varlen", "padded, sdpa"]
    assert seen[0]["samples_per_second_over_best_baseline"] is None
    (last,) = json.loads(output.read_text())["results"]
    assert "out of memory" in last["baselines"][0]["failure"]
    assert last["baselines_not_run"] == ["padded, sdpa"]
    assert last["best_baseline"] == "packed, torch_varlen, recomputed"
    assert last["samples_per_second_over_best_baseline"] == 2.0
