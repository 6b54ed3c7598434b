"""What a device does by itself: threads, host memory. That of a GPU runs with its calls to CUDA replaced."""

import threading
from typing import Any

import pytest
import torch

from internvl_megatron import device as device_module
from internvl_megatron.device import Device, copy_to_host
from internvl_megatron.train.windows import WindowMaker
from tests.support.layouts import run_config
from tests.support.models import small_model

BLOCK_BYTES = 1 << 16


def in_blocks(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return device_module._in_blocks(tensors, BLOCK_BYTES, pin_memory=False)


def test_a_thread_gets_the_processs_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    Device(kind="cuda", index=3, attention="sdpa").use_in_this_thread()
    Device(kind="cpu", index=0, attention="sdpa").use_in_this_thread()
    assert chosen == [3]


def test_the_thread_that_prepares_windows_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(Device, "use_in_this_thread", lambda _: threads.append(threading.get_ident()))
    nothing: Any = None
    maker = WindowMaker(run_config(small_model()), nothing, Device("cpu", 0, "sdpa"), nothing)
    assert maker._thread is not None
    assert [maker._thread.submit(threading.get_ident).result() for _ in range(2)] == 2 * threads
    assert threads != [threading.get_ident()]


def test_tensors_in_a_block_have_their_own_bytes() -> None:
    shapes_and_types: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((), torch.float32),
        ((3, 7), torch.bfloat16),
        ((0, 5), torch.float32),
        ((901,), torch.float32),
        ((17,), torch.uint8),
        ((5, 5, 5), torch.int64),
        ((30_000,), torch.float32),
    ]
    originals = [torch.randn(200_000)[: max(1, torch.Size(shape).numel())] for shape, _ in shapes_and_types]
    tensors = [
        original[: torch.Size(shape).numel()].to(dtype).view(shape)
        for original, (shape, dtype) in zip(originals, shapes_and_types, strict=True)
    ]
    memory = in_blocks(tensors)
    for place, tensor in zip(memory, tensors, strict=True):
        assert (place.shape, place.dtype) == (tensor.shape, tensor.dtype)
        assert place.is_contiguous()
        assert place.data_ptr() % 16 == 0
        place.copy_(tensor)
    assert all(torch.equal(place, tensor) for place, tensor in zip(memory, tensors, strict=True)), (
        "one overwrote another"
    )


def test_many_tensors_take_little_more_than_their_bytes() -> None:
    """Power-of-two blocks, as page-locked memory has them; by itself each of these would be rounded up by 1.9."""
    tensors = [torch.empty(276, dtype=torch.float32) for _ in range(100)]  # 1104 bytes: 2048 by itself
    blocks = {place.untyped_storage().data_ptr(): place.untyped_storage().nbytes() for place in in_blocks(tensors)}
    assert all(size & (size - 1) == 0 for size in blocks.values())
    assert sum(blocks.values()) < 1.5 * sum(tensor.nbytes for tensor in tensors)
    large, small = in_blocks(
        [torch.empty(5 * BLOCK_BYTES, dtype=torch.uint8), torch.empty(BLOCK_BYTES, dtype=torch.uint8)]
    )
    assert large.untyped_storage().nbytes() == 8 * BLOCK_BYTES
    assert small.untyped_storage().data_ptr() == large.untyped_storage().data_ptr(), "in what the large one left"


def test_copies_go_where_they_fit() -> None:
    kept, other = torch.zeros(3), torch.zeros(5)
    copies = copy_to_host([torch.ones(3), torch.ones(4), torch.ones(2)], [kept, other, None])
    assert copies[0] is kept
    assert torch.equal(kept, torch.ones(3))
    assert [len(copy) for copy in copies] == [3, 4, 2]
    assert torch.equal(other, torch.zeros(5))
    assert not copies[1].is_pinned()
