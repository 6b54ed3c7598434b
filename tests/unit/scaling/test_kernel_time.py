"""Kernels against what was measured on an H200."""

import re
from pathlib import Path

import pytest

from internvl_megatron.errors import ConfigError
from internvl_megatron.scaling.gpus import GPUS, find_gpu
from internvl_megatron.scaling.kernel_time import Kernels, Product

README = Path(__file__).resolve().parents[3] / "benchmarks/README.md"
H200 = GPUS["h200-141g"]


def measured_products() -> list[tuple[Product, float, float]]:
    """Rows of the table of products: shape, FLOP/s in bf16 and in FP8 with current scaling."""
    rows = re.findall(r"^\| (\d+), (\d+), (\d+) \| (\d+) \| (\d+) \| \d+ \|$", README.read_text(), re.MULTILINE)
    assert len(rows) == 7, "the table of products has moved"
    return [(Product(*map(int, row[:3])), float(row[3]) * 1e12, float(row[4]) * 1e12) for row in rows]


@pytest.mark.parametrize(("shape", "bf16", "_fp8"), measured_products(), ids=lambda value: str(value))
def test_products_in_bf16(shape: Product, bf16: float, _fp8: float) -> None:
    flops = 6 * shape.tokens * shape.inputs * shape.outputs
    assert sum(Kernels(H200).product(shape)) == pytest.approx(flops / bf16, rel=0.09)


def test_products_in_fp8_that_the_host_does_not_hold_up() -> None:
    """Products of more than 1.5 TFLOP; of the others the launches were measured."""
    seen = 0
    for shape, _, fp8 in measured_products():
        flops = 6 * shape.tokens * shape.inputs * shape.outputs
        if flops > 1.5e12:
            assert sum(Kernels(H200, "fp8").product(shape)) == pytest.approx(flops / fp8, rel=0.11)
            seen += 1
    assert seen == 4


def test_narrow_products_are_slower_for_their_flops() -> None:
    def speed(width: int) -> float:
        return 6 * 8192 * width**2 / sum(Kernels(H200).product(Product(8192, width, width)))

    assert speed(512) < speed(2048) < speed(8192)


def test_frozen_weights_save_a_third() -> None:
    shape = Product(8192, 8192, 8192)
    kernels = Kernels(H200)
    assert sum(kernels.product(shape, trains_weights=False)) == pytest.approx(
        2 / 3 * sum(kernels.product(shape)), rel=0.05
    )


def test_what_there_is_not_is_said() -> None:
    with pytest.raises(ConfigError, match="a100-80g has no FP8"):
        Kernels(find_gpu("a100-80g"), "fp8")
    with pytest.raises(ConfigError, match="h100-80g"):
        find_gpu("h100")
