"""On a GPU: a whole model, without data-parallel wrapping, gives the logits it gives on the CPU."""

import numpy as np
import pytest
import torch

from internvl_megatron.launcher import launch
from tests.support.forward import logits_of_rows, on_one_rank
from tests.support.layouts import run_config
from tests.support.models import small_model
from tests.support.rows import random_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]


@pytest.mark.parametrize("family", ["300m", "6b"])
def test_logits_equal_the_cpus(family: str) -> None:
    model = small_model(family)
    data = random_step(model, num_rows=4, seed=0)
    (on_cpu,) = launch(on_one_rank, 1, run_config(model), None, logits_of_rows, data, device="cpu")
    config = run_config(model, device="cuda")
    (on_gpu,) = launch(on_one_rank, 1, config, None, logits_of_rows, data, device="cuda")
    for ours, theirs in zip(on_gpu, on_cpu, strict=True):
        np.testing.assert_allclose(
            ours[:, : model.language.vocab_size], theirs[:, : model.language.vocab_size], atol=1e-4
        )
