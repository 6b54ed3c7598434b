"""A conversion holds a parameter or two in memory, whatever the size of the model."""

import sys
from dataclasses import replace

import pytest

from checkpoint_convert.mapping import mapping
from internvl_megatron.config.models import INTERNVL3
from tests.support.models import small_model
from tools.benchmark_convert import FILE_BYTES, largest, measured, write_source


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """700 MB in parameters of at most 100 MB; what `inspect` takes, which reads no values, is the program itself."""
    model = small_model(
        hidden_size=1024, num_layers=8, num_heads=16, head_size=64, ffn_hidden_size=8192, vocab_size=50000
    )
    num_bytes = write_source(tmp_path / "source", model, sparse=True)
    largest_bytes = max(
        2 * entry.shape[0] * entry.shape[1] for entry in mapping(model, "transformers") if len(entry.shape) == 2
    )
    assert num_bytes > 6 * largest_bytes
    tool = [sys.executable, "-m", "checkpoint_convert"]
    program = measured([*tool, "inspect", str(tmp_path / "source")])["peak_bytes"]
    converting = measured([*tool, "hf-to-megatron", str(tmp_path / "source"), str(tmp_path / "ours")])["peak_bytes"]
    assert 0 < program < converting < program + 3 * largest_bytes


def test_planning_78b_takes_little(tmp_path):
    """Names, shapes and files of the whole: 157 GB of holes."""
    model = INTERNVL3["78B"]
    assert write_source(tmp_path / "source", model, sparse=True) > 150e9
    tool = [sys.executable, "-m", "checkpoint_convert"]
    small = replace(small_model(), vision=replace(small_model().vision, num_layers=1))
    write_source(tmp_path / "small", small, sparse=True)
    little, much = (measured([*tool, "inspect", str(tmp_path / name)])["peak_bytes"] for name in ("small", "source"))
    assert much < little + 100e6


@pytest.mark.slow
def test_78b_stays_below_two_files_and_a_gigabyte(tmp_path):
    found = largest(tmp_path)
    assert found["limit_bytes"] == 2 * FILE_BYTES + 10**9
    assert found["below_limit"], found
