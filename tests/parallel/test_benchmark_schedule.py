"""The benchmark of the schedules: what it counts meets the goals, what it measures with is as it says.

Nothing here looks at seconds: they depend on the machine and on what else runs on it.
"""

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from internvl_megatron.ranks import RankInfo
from tools.benchmark import main

# A minute and a half: it trains under every schedule.
pytestmark = [pytest.mark.parallel, pytest.mark.slow]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("benchmark") / "record.json"
    assert main(["schedule", "--quick", "--output", str(path)]) == 0
    return json.loads(path.read_text())


def cases_on_four_ranks(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for case in record["counted"] if case["setting"]["grid"] in ("PP4", "TP2xPP2")]


def test_vision_work_is_balanced(record: dict[str, Any]) -> None:
    found = [case["decoupled"]["vision_busiest_over_mean"] for case in cases_on_four_ranks(record)]
    assert max(busiest for busiest in found if busiest is not None) <= 1.05


def test_speed_up_over_the_best_first_stage_layout(record: dict[str, Any]) -> None:
    found = {
        (case["setting"]["size"], case["setting"]["image_share"]): case["speed_up"]
        for case in record["counted"]
        if case["setting"]["grid"] == "PP4"
    }
    assert found["1B", 0.5] >= 1.5
    assert found["78B", 0.5] >= 1.14
    for size in ("1B", "78B"):
        assert found[size, 0.0] >= 0.98
        assert found[size, 0.0] < found[size, 0.25] < found[size, 0.5] < found[size, 0.75]


def test_filling_the_pauses_pays_where_they_are_longer_than_the_encoder_needs(record: dict[str, Any]) -> None:
    for case in record["counted"] + record["counted_otherwise"]:
        setting = case["setting"]
        if setting["size"] == "78B" and setting["image_share"] > 0 and setting["padded"]:
            assert case["speed_up"] > case["speed_up_phases_apart"] + 0.03, setting


def test_without_images_or_padding_phases_are_apart(record: dict[str, Any]) -> None:
    for case in record["counted"] + record["counted_otherwise"]:
        if case["setting"]["image_share"] == 0 or not case["setting"]["padded"]:
            assert case["decoupled"] == case["phases_apart"]


def test_no_planned_split_is_better_than_the_best(record: dict[str, Any]) -> None:
    for case in record["counted"]:
        best, planned = (case[name]["critical_path_flops"] for name in ("first_stage", "first_stage_planned"))
        assert best <= planned * 1.001  # the record has four digits


def test_nothing_is_faster_than_what_the_work_allows(record: dict[str, Any]) -> None:
    for case in record["counted"] + record["counted_otherwise"]:
        assert case["speed_up"] <= case["speed_up_at_most"] * 1.001


def test_rows_are_what_was_asked_for(record: dict[str, Any]) -> None:
    for case in record["counted"]:
        assert case["rows"]["image_share"] == pytest.approx(case["setting"]["image_share"], abs=0.03)


def test_real_steps_were_measured(record: dict[str, Any]) -> None:
    (case,) = record["measured"]
    ours, apart, theirs = case["decoupled"], case["phases_apart"], case["first_stage"]
    for layout in (ours, apart, theirs):
        assert sum(layout["stage_layers"]) == 24
    total = theirs["most_tiles_per_rank"][0]  # one rank encodes all tiles
    assert ours["most_tiles_per_rank"][0] == apart["most_tiles_per_rank"][0] == -(-total // 4)
    for layout in (ours, apart, theirs):
        assert layout["exchanged_bytes"][0] > 0


def _what_waiting_costs(info: RankInfo) -> tuple[float, float, bool]:
    """Seconds waited for the slowest rank, CPU seconds of the thread in them, whether autograd ran in this thread."""
    import torch
    import torch.distributed as dist

    from internvl_megatron.device import open_device
    from internvl_megatron.ranks import joined

    with joined(info, open_device("cpu"), 60):
        dist.barrier()
        wall, cpu = time.perf_counter(), time.thread_time()
        if info.rank == 0:
            time.sleep(1.0)
        dist.all_reduce(torch.zeros(1000))
        wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    threads: list[int] = []
    leaf = torch.ones(100, requires_grad=True)
    doubled = leaf * 2
    doubled.register_hook(lambda _gradient: threads.append(threading.get_ident()))
    doubled.sum().backward()
    return wall, cpu, threads == [threading.get_ident()]


def test_waiting_costs_no_cpu_seconds_and_backward_runs_in_the_same_thread(
    run_ranks: Callable[..., list[Any]],
) -> None:
    for waited, cpu, same_thread in run_ranks(_what_waiting_costs, 2):
        assert waited > 0.9
        assert cpu < 0.05 * waited
        assert same_thread
