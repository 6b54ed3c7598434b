"""Processes that decode images: the same tiles, nothing left behind, and no image or signal that stops the others."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from internvl_megatron.data import decode_pool
from internvl_megatron.data.decode_pool import DecodePool
from internvl_megatron.data.images import ImageRef, decode_tiles
from internvl_megatron.errors import DataError

TILE_PIXELS = 28
TIMEOUT_SECONDS = 60.0


@pytest.fixture
def open_pool():
    """A pool with so many processes; closed at the end of the test."""
    pools = []

    def make(num_workers=1, timeout_seconds=TIMEOUT_SECONDS):
        pools.append(DecodePool(num_workers, TILE_PIXELS, True, timeout_seconds))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


@pytest.fixture
def ref(data_folder):
    """An image of a given size, and how it is cut."""

    def make(name="a.png", grid=(2, 1), jpeg_seed=None):
        data_folder.image(name, 60, 30)
        return ImageRef(str(data_folder.folder / name), grid, grid[0] * grid[1] + 1, jpeg_seed, "x.jsonl:3")

    return make


def is_running(pid):
    """Whether there is such a process that has not ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(holds):
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("did not come true in 30 seconds")


def test_tiles_are_those_of_the_images_in_order(open_pool, ref):
    refs = [ref(f"{index}.png", (index % 3 + 2, 1), jpeg_seed=index) for index in range(12)]
    pool = open_pool(2)
    futures = [pool.submit(image) for image in refs]
    for image, future in zip(refs, futures, strict=True):
        tiles = future.result()
        assert tiles.dtype == np.uint8 and tiles.flags.writeable, "torch takes no array that cannot be written"
        np.testing.assert_array_equal(tiles, decode_tiles(image, TILE_PIXELS, True))
    assert len(pool.pids()) == 2


def test_a_broken_image_has_the_same_message_as_without_processes(open_pool, ref):
    image = ref()
    path = Path(image.path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError) as expected:
        decode_tiles(image, TILE_PIXELS, True)
    pool = open_pool()
    with pytest.raises(DataError) as found:
        pool.submit(image).result()
    assert str(found.value) == str(expected.value) and str(found.value).startswith("x.jsonl:3: field 'image': ")
    path.unlink()
    with pytest.raises(DataError, match="file not found"):
        pool.submit(image).result()
    assert pool.submit(ref("good.png")).result().shape == (3, 3, TILE_PIXELS, TILE_PIXELS)


def test_arrays_outlive_the_pool_and_then_give_their_memory_back(open_pool, ref):
    def mapped():
        return Path("/proc/self/maps").read_text().count("memfd:tiles")

    def open_files():
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    gc.collect()
    others = mapped()  # what other tests of this process still hold
    pool = open_pool()
    pool.submit(ref()).result()
    files = open_files()
    kept = [pool.submit(ref()).result() for _ in range(5)]
    assert mapped() - others in (5, 6) and open_files() == files
    expected = [array.copy() for array in kept]
    for index in range(20):
        pool.submit(ref(f"{index}.png", (index % 2 + 1, 2))).result()
    assert mapped() - others <= 12, "what nobody looks into is used again"
    np.testing.assert_array_equal(np.stack(kept), np.stack(expected))
    pids = pool.pids()
    pool.close()
    assert open_files() == files - 1, "the socket"
    assert not any(map(is_running, pids))
    np.testing.assert_array_equal(kept[4], decode_tiles(ref(), TILE_PIXELS, True))
    del kept
    assert mapped() == others


def test_a_process_that_dies_is_replaced(open_pool, ref):
    pool = open_pool()
    pool.submit(ref()).result()
    before = pool.pids()
    os.kill(before[0], signal.SIGKILL)
    np.testing.assert_array_equal(pool.submit(ref()).result(), decode_tiles(ref(), TILE_PIXELS, True))
    assert pool.pids() != before


def fifo(folder):
    """An image that is never there to read: fsspec waits for it, where a local name would be refused."""
    path = folder / "never.png"
    os.mkfifo(path)
    return ImageRef(f"file://{path}", (1, 1), 1, None, "x.jsonl:7")


def test_an_image_that_kills_two_processes_is_broken_and_costs_nothing_else(open_pool, ref, tmp_path):
    pool = open_pool()
    pool.submit(ref()).result()
    future = pool.submit(fifo(tmp_path))
    after = pool.submit(ref())
    for _ in range(2):
        wait_until(pool.pids)
        (victim,) = pool.pids()
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda victim=victim: victim not in pool.pids())
    with pytest.raises(
        DataError, match=r"x\.jsonl:7: field 'image': image .*never\.png: ends the process .* by SIGKILL"
    ):
        future.result()
    assert len(after.result()) == 3


def test_an_image_that_takes_too_long_is_broken_and_costs_nothing_else(open_pool, ref, tmp_path):
    pool = open_pool(timeout_seconds=0.2)
    slow, after = pool.submit(fifo(tmp_path)), pool.submit(ref())
    with pytest.raises(DataError, match=r"x\.jsonl:7: .*never\.png: was not decoded in 0\.2 seconds"):
        slow.result()
    assert len(after.result()) == 3


def test_signals_to_the_whole_job_leave_the_processes_to_their_parent(open_pool, ref):
    pool = open_pool()
    pool.submit(ref()).result()
    before = pool.pids()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(before[0], number)
    pool.submit(ref()).result()
    assert pool.pids() == before


def test_processes_end_with_a_parent_that_is_killed(ref):
    image = ref()
    code = (
        "import os, sys, time\n"
        "from internvl_megatron.data.decode_pool import DecodePool\n"
        "from internvl_megatron.data.images import ImageRef\n"
        f"pool = DecodePool(1, {TILE_PIXELS}, True, 60)\n"
        f"pool.submit(ImageRef({image.path!r}, {image.grid}, {image.num_tiles}, None)).result()\n"
        "print(pool.pids()[0], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    wait_until(lambda: not is_running(int(ended.stdout)))


def test_a_process_that_cannot_start_is_no_fault_of_an_image(open_pool, ref, monkeypatch):
    monkeypatch.setattr(decode_pool.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"cannot run: ended with status 1; set data\.num_workers=0"):
        open_pool().submit(ref()).result()


def test_processes_import_nothing_of_the_trainer():
    code = "import sys, internvl_megatron.data.decode_worker; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert not {"torch", "megatron", "transformers", "transformer_engine", "tokenizers"} & set(found)
    assert {"numpy", "PIL", "internvl_megatron"} <= set(found)


def test_processes_stay_small(open_pool, data_folder):
    """Private memory after images that fill 13 tiles of 448 pixels, over that after the first."""

    def private_bytes():
        lines = Path(f"/proc/{pool.pids()[0]}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private"))

    data_folder.image("large.png", 640, 480)
    image = ImageRef(str(data_folder.folder / "large.png"), (4, 3), 13, 5)
    pool = DecodePool(1, 448, True, TIMEOUT_SECONDS)
    try:
        pool.submit(image).result()
        for _ in range(20):
            pool.submit(image).result()
        assert private_bytes() < 150e6
    finally:
        pool.close()
