"""What moves to host memory between forward and backward, and what does not."""

import pytest
import torch

from internvl_megatron.device import Device
from internvl_megatron.train import host_memory
from internvl_megatron.train.host_memory import keep_on_host

CPU = Device(kind="cpu", index=0, attention="sdpa")


def gradients(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], list[tuple[int, ...]]]:
    """Gradients of a small net, and the shapes of what was copied."""
    copied: list[tuple[int, ...]] = []
    plain = Device.copy_to_host

    def copy(self: Device, tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tuple(tensor.shape))
        return plain(self, tensor)

    monkeypatch.setattr(Device, "copy_to_host", copy)
    monkeypatch.setattr(host_memory, "SMALLEST_BYTES", 64)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    inputs = torch.randn(32, 8, requires_grad=True)
    with keep_on_host(CPU, wanted):
        output = net(inputs)
    output.square().sum().backward()
    return [tensor.grad for tensor in (inputs, *net.parameters()) if tensor.grad is not None], copied


def test_gradients_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    (there, copied), (here, nothing) = gradients(True, monkeypatch), gradients(False, monkeypatch)
    assert len(here) == 5
    assert all(torch.equal(one, other) for one, other in zip(there, here, strict=True))
    assert copied
    assert nothing == []


def test_parameters_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = gradients(True, monkeypatch)[1]
    assert (32, 16) in copied, "activations move"
    assert not {(8, 16), (16, 8), (16, 4), (4, 16)} & set(copied)
