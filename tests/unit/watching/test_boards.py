"""Weights & Biases gets what TensorBoard gets (read back from the files of its own package, without network), or says it is missing."""

import html
import importlib.util
import json
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from internvl_megatron.errors import ConfigError
from internvl_megatron.watching.boards import WANDB_ID_FILE, ShownSample, Wandb, check_wandb

HAS_WANDB = importlib.util.find_spec("wandb") is not None
LOG_HEADER_BYTES, BLOCK_BYTES, RECORD_HEADER_BYTES = 7, 32768, 7


def records(path):
    """Records of a `.wandb` file: LevelDB's log format (blocks of parts, first and last marked) around protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportMissingImports]

    data, at, parts = path.read_bytes(), LOG_HEADER_BYTES, b""
    while at < len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        if left < RECORD_HEADER_BYTES:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + RECORD_HEADER_BYTES :][:length]
        at += RECORD_HEADER_BYTES + length
        if kind in (1, 4):  # whole, or last
            yield Record.FromString(parts)
            parts = b""


def history(run_folder):
    (path,) = run_folder.glob("*.wandb")
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.mark.skipif(not HAS_WANDB, reason="Weights & Biases is not installed (pip install wandb)")
def test_wandb_has_figures_and_samples_of_a_run_that_continues(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    picture = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    for session, is_new in enumerate((True, False)):
        board = Wandb(tmp_path, "project", "a run", {"data": {"seed": 3}}, is_new)
        board.show_figures(session + 1, {"loss/loss": 2.5 - session}, {"data/log2_delta": {0.0: 2, -8.0: 3}})
        board.show_figures(session + 2, {"loss/loss": 1.5 - session}, {"data/log2_delta": {}})
        board.show_samples(session + 2, [ShownSample("a <b>\n⟦c⟧", [picture])])
        board.close()
    name = (tmp_path / WANDB_ID_FILE).read_text().strip()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(name) for folder in folders), "one run of two sessions"
    for session, folder in enumerate(folders):
        first, second, samples = history(folder)
        assert (first["step"], first["loss/loss"]) == (session + 1, 2.5 - session)
        assert first["data/log2_delta/values"] == [3, 2]
        assert first["data/log2_delta/bins"] == [-8.5, -4, 0.5]
        assert (second["step"], second["loss/loss"]) == (session + 2, 1.5 - session)
        assert samples["step"] == session + 2
        text = (folder / "files" / samples["samples/0/text/path"]).read_text(encoding="utf-8")
        assert html.escape("a <b>\n⟦c⟧") in text
        (shown,) = samples["samples/0/pictures/filenames"]
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "files" / shown)), picture)
    settings = [
        record.run.config.update for record in records(next(folders[0].glob("*.wandb"))) if record.HasField("run")
    ]
    assert any(
        item.key == "data" and json.loads(item.value_json) == {"seed": 3} for items in settings for item in items
    )


def test_a_run_that_asks_for_wandb_without_it_is_told_so(monkeypatch):
    check_wandb(None)
    if not HAS_WANDB:
        with pytest.raises(ConfigError, match=r"wandb_project=vl: .* pip install 'internvl_megatron\[wandb\]'"):
            check_wandb("vl")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb_project=vl: .*or set wandb_project=null"):
        check_wandb("vl")
