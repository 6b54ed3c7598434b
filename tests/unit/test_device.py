"""What a device does by itself: threads. That of a GPU runs with its calls to CUDA replaced."""

import threading
from typing import Any

import pytest
import torch

from internvl_megatron.device import Device
from internvl_megatron.train.windows import WindowMaker
from tests.support.layouts import run_config
from tests.support.models import small_model


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
