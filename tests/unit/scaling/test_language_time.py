"""The language model's time against the simulated pipeline, and against what follows from a layout."""

from dataclasses import replace

import numpy as np
import pytest

from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.parallel.layout import Layout
from internvl_megatron.scaling.collective_time import LINK_SHARE, Network
from internvl_megatron.scaling.gpus import GPUS
from internvl_megatron.scaling.kernel_time import Kernels
from internvl_megatron.scaling.language_time import (
    OURS,
    LanguageRun,
    data_parallel_seconds,
    layer_messages,
    pipeline_seconds,
    stage_times,
)
from internvl_megatron.scaling.memory import stage_parameters
from internvl_megatron.scaling.pipeline_time import one_f_one_b

H100 = GPUS["h100-80g"]
KERNELS, NETWORK = Kernels(H100), Network(H100)
RUN = LanguageRun(
    INTERNVL3["78B"].language, Layout(8, 4, 2), (20, 20, 20, 20), 16, 8192, 8192.0**2, 2048, sequence_parallel=True
)


@pytest.mark.parametrize("stage_layers", [(20, 20, 20, 20), (17, 21, 21, 21), (22, 21, 20, 17)])
def test_the_pipeline_takes_as_long_as_when_it_is_simulated(stage_layers: tuple[int, ...]) -> None:
    run = replace(RUN, stage_layers=stage_layers)
    stages = stage_times(run, KERNELS, NETWORK)
    passes = np.array([stage.passes for stage in stages])
    simulated = one_f_one_b(*(np.tile(passes[:, [kind]], (1, run.rows_per_replica)) for kind in (0, 1))).makespan
    assert pipeline_seconds(run, stages)[0] == pytest.approx(float(simulated), rel=0.02)


def test_chunks_divide_the_pause() -> None:
    stages = stage_times(RUN, KERNELS, NETWORK)
    interleaved = replace(RUN, layout=replace(RUN.layout, virtual_size=5), stage_layers=(4,) * 20)
    assert pipeline_seconds(interleaved, stages)[1] == pytest.approx(pipeline_seconds(RUN, stages)[1] / 5)


def test_computing_layers_again_costs_a_forward_pass() -> None:
    kept, again = (stage_times(replace(RUN, recompute=what), KERNELS, NETWORK)[1].passes for what in ("none", "full"))
    neighbours = stage_times(RUN, KERNELS, NETWORK)[1].to_neighbours.forward
    assert again.forward == kept.forward
    assert again.backward == pytest.approx(kept.backward + kept.forward - neighbours)


def test_context_parallel_ranks_share_the_work_and_send() -> None:
    one = stage_times(RUN, KERNELS, NETWORK)[1]
    two = stage_times(replace(RUN, layout=replace(RUN.layout, context_size=2, tensor_size=4)), KERNELS, NETWORK)[1]
    assert sum(two.kernels) == pytest.approx(sum(one.kernels), rel=0.1), "eight ranks each"
    assert sum(two.messages) < sum(one.messages), (
        "half of the row through a smaller group, and a little to trade heads"
    )


def test_in_fp8_what_is_gathered_for_products_is_half_as_large() -> None:
    """78B on TP8 with sequence parallelism: forward two gathers and two sums of a row's 8192 x 8192 values a layer, backward two more
    gathers; 7/8 of the bytes pass a link."""
    bf16, fp8 = (layer_messages(RUN, NETWORK, OURS, in_fp8)[0] for in_fp8 in (False, True))
    half = 8192 * 8192 * 7 / 8 / (LINK_SHARE * H100.machine_bandwidth)
    assert bf16.forward - fp8.forward == pytest.approx(2 * half)
    assert bf16.backward - fp8.backward == pytest.approx(4 * half)
    whole = replace(RUN, sequence_parallel=False)
    assert layer_messages(whole, NETWORK, OURS, True) == layer_messages(whole, NETWORK, OURS), "sums are in bf16"


def test_more_copies_send_more_and_update_less() -> None:
    few, many = (replace(RUN, layout=replace(RUN.layout, data_size=size)) for size in (2, 64))
    stages = stage_times(few, KERNELS, NETWORK)
    sent, updates = zip(
        *(data_parallel_seconds(run, stages, KERNELS, NETWORK, OURS) for run in (few, many)), strict=True
    )
    assert sent[0] < sent[1]
    assert updates[0] == pytest.approx(32 * updates[1])
    assert data_parallel_seconds(replace(few, trainable=False), stages, KERNELS, NETWORK, OURS) == (0, 0)


def test_parameters_are_those_of_the_memory_model() -> None:
    from internvl_megatron.config.plan import plan
    from tests.unit.scaling.test_predicted_step import config_of

    config = config_of("internvl3_78b_pretrain", 64)
    made = plan(config, 64)
    run = replace(RUN, layout=made.layout, stage_layers=made.stage_layers)
    for stage in range(4):
        assert run.parameters(stage) == pytest.approx(stage_parameters(config.model, made, stage), rel=1e-3)
