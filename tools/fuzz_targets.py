"""What reads bytes that others have written, each with good files to begin with: the targets of `tools/fuzz.py`.

A reader may take a broken file or refuse it with its documented error. Everything else is a fault. Where checksums would refuse
every change, `repair` makes them fit again, so that what lies behind is reached too.
"""

import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from internvl_megatron.errors import UserError

if TYPE_CHECKING:
    from internvl_megatron.data.fast_tokenizer import FastTokenizer
    from internvl_megatron.data.records import SampleSettings

TEXTS = ["how many digits are there in the picture?", "there are three: seven, two and one.", "system user assistant"]
RECORD = {"conversations": [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "three"}]}


@dataclass(frozen=True)
class Target:
    """One reader."""

    write: Callable[[Path], None]
    """Writes good files into an empty folder."""
    read: Callable[[Path], object]
    """Reads them as the program does."""
    repair: Callable[[Path], None] | None = None
    """Makes checksums fit what was changed."""
    errors: tuple[type[BaseException], ...] = (UserError,)
    """How a file may be refused."""
    cpu_seconds: float = 20.0
    """More than a broken file can be worth, imports of its reader included."""


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def _settings() -> "SampleSettings":
    from internvl_megatron.config.schema import DataConfig
    from internvl_megatron.data.records import SampleSettings

    data = DataConfig(tokens_per_row=64, tiles_per_row=4, packing_pool_samples=2, max_tiles=2, system_prompt="")
    return SampleSettings(data=replace(data, max_skipped_share=None), tile_pixels=28, tokens_per_tile=4)


@cache
def _small_tokenizer() -> "FastTokenizer":
    from internvl_megatron.data.fast_tokenizer import FastTokenizer
    from internvl_megatron.data.tokenizer_build import train_small_tokenizer

    return FastTokenizer(train_small_tokenizer(TEXTS, vocab_size=320), "small")


# Weights


def _write_safetensors(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for number in range(2):
        tensors = {
            f"layer.{number}.weight": torch.ones(3, 2),
            f"layer.{number}.bias": torch.ones(3, dtype=torch.bfloat16),
        }
        save_file(tensors, folder / f"model-{number}.safetensors")
    placed = {
        f"layer.{number}.{name}": f"model-{number}.safetensors" for number in range(2) for name in ("weight", "bias")
    }
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 60}, "weight_map": placed})


def _read_safetensors(folder: Path) -> None:
    from internvl_megatron.checkpoint.safetensors_folder import DTYPES, SafetensorsFolder

    tensors = SafetensorsFolder.open(folder)
    for name, info in tensors.items():
        if info.dtype in DTYPES:
            tensors.read(name).float().sum()
    tensors.close()


def _write_model(folder: Path) -> None:
    from internvl_megatron.checkpoint.weights import write_model
    from internvl_megatron.config.recipes import demo_digits

    write_model(folder, demo_digits().model)


def _read_model(folder: Path) -> None:
    from internvl_megatron.checkpoint.weights import read_model

    read_model(folder)


def _write_hf_config(folder: Path) -> None:
    vision = {
        "model_type": "intern_vit_6b", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
        "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False, "image_size": 28, "patch_size": 7, "hidden_act": "gelu",
    }  # fmt: skip
    language = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512, "rope_theta": 1e6,
        "rms_norm_eps": 1e-6, "hidden_act": "silu",
    }  # fmt: skip
    whole = {"model_type": "internvl_chat", "vision_config": vision, "llm_config": language, "downsample_ratio": 0.5,
             "ps_version": "v2", "select_layer": -1, "force_image_size": 28, "template": "internvl2_5"}  # fmt: skip
    _write_json(folder / "config.json", whole)


def _read_hf_config(folder: Path) -> None:
    from checkpoint_convert.hf_config import read_json, read_model

    read_model(read_json(folder / "config.json"))


# Configurations


def _write_run_config(folder: Path) -> None:
    from internvl_megatron.config.overrides import to_json
    from internvl_megatron.config.recipes import demo_digits

    (folder / "config.json").write_text(to_json(demo_digits()))


def _read_run_config(folder: Path) -> None:
    from internvl_megatron.config.overrides import from_json
    from internvl_megatron.config.plan import plan

    plan(from_json(folder / "config.json"), 4)


def _write_overrides(folder: Path) -> None:
    from internvl_megatron.config.recipes import demo_digits
    from internvl_megatron.config.schema import RunConfig

    config: RunConfig = demo_digits()
    lines = [f"num_steps={config.num_steps}", f"optimizer.learning_rate={config.optimizer.learning_rate}", "seed=3",
             "parallel.stage_layers=2,2", "data.group_weights=a=1,b=2", "data.on_bad_sample=skip", "parallel.pad_rows=false",
             "checkpoint.save_every_steps=null", "model.language.hidden_size=64", "folder=runs/x"]  # fmt: skip
    (folder / "overrides.txt").write_text("\n".join(lines))


def _read_overrides(folder: Path) -> None:
    from internvl_megatron.config.overrides import apply_overrides
    from internvl_megatron.config.plan import plan
    from internvl_megatron.config.recipes import demo_digits

    lines = (folder / "overrides.txt").read_bytes().decode("utf-8", errors="surrogateescape").split("\n")
    plan(apply_overrides(demo_digits(), lines), 4)


def _write_settings(folder: Path) -> None:
    (folder / "settings.toml").write_text(
        "[any.64]\nparallel.tensor_size = 2\ndata.num_workers = 1\n[sft.64]\nrows_per_step = 8\n"
    )


def _read_settings(folder: Path) -> None:
    from internvl_megatron.cluster.request import requested_config

    requested_config("internvl3_1b_sft", 64, folder / "settings.toml", [])


# Data


def _write_meta(folder: Path) -> None:
    entry = {"root": "images/", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 1, "length": 3}
    more = {
        "root": "",
        "annotation": "b.jsonl",
        "data_augment": True,
        "repeat_time": 0.5,
        "max_dynamic_patch": 2,
        "group": "text",
    }
    _write_json(folder / "meta.json", {"a": entry, "b": more})


def _read_meta(folder: Path) -> None:
    from internvl_megatron.config.group_weights import parse_group_weights
    from internvl_megatron.data.meta import read_meta
    from internvl_megatron.data.mixture import dataset_groups

    dataset_groups(read_meta(folder / "meta.json"), None)
    parse_group_weights(("a=1",))


def _write_records(folder: Path) -> None:
    from internvl_megatron.data.jsonl_index import build_index

    lines = [json.dumps({**RECORD, "id": number}) for number in range(5)]
    (folder / "a.jsonl").write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    build_index(folder / "a.jsonl")


def _read_records(folder: Path) -> None:
    from internvl_megatron.data.jsonl_file import JsonlFile
    from internvl_megatron.data.jsonl_index import open_index

    records = JsonlFile(folder / "a.jsonl", open_index(folder / "a.jsonl"))
    for number in range(min(len(records), 100)):
        try:
            records.read(number)
        except UserError:  # one bad record is left out, and the others are read
            continue


def _repair_index(folder: Path) -> None:
    """A header that says the source it lies beside, and has its checksum."""
    from internvl_megatron.data import jsonl_index

    source = folder / "a.jsonl"
    for path in folder.glob("*.idx*"):
        content = path.read_bytes()
        size = jsonl_index.HEADER_BYTES
        try:
            facts = json.loads(content[jsonl_index._CHECKSUM.size : size].rstrip(b" "))
            with source.open("rb") as file:
                facts |= {
                    "source_bytes": source.stat().st_size,
                    "source_mtime_ns": source.stat().st_mtime_ns,
                    "probe": jsonl_index._probe(file),
                }
        except (ValueError, TypeError):
            facts = None
        text = content[jsonl_index._CHECKSUM.size : size].rstrip(b" ") if facts is None else json.dumps(facts).encode()
        header = jsonl_index._CHECKSUM.pack(jsonl_index._MAGIC, zlib.crc32(text)) + text
        path.write_bytes(header.ljust(size)[:size] + content[size:])


def _write_images(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, size=(33, 40, 3), dtype=np.uint8)
    for ending in ("jpg", "png", "webp", "bmp", "gif", "tiff", "ppm"):
        Image.fromarray(pixels).save(folder / f"picture.{ending}")


def _read_images(folder: Path) -> None:
    from internvl_megatron.data.images import ImageRef, decode_tiles, image_size

    for path in sorted(folder.iterdir()):
        try:
            image_size(str(path))
            decode_tiles(ImageRef(str(path), (1, 2), 3, jpeg_seed=1), 28, use_thumbnail=True)
        except UserError:  # a broken picture costs its own sample
            continue


def _write_row_store(folder: Path) -> None:
    import shutil
    import tempfile

    from internvl_megatron.data.dataset import load_datasets
    from internvl_megatron.data.row_store_writer import begin_store, describe, finish_store, write_part
    from internvl_megatron.data.stream import SampleStream

    tokenizer, settings = _small_tokenizer(), _settings()
    with tempfile.TemporaryDirectory() as source:
        (Path(source) / "a.jsonl").write_text("".join(json.dumps({**RECORD, "id": k}) + "\n" for k in range(6)))
        _write_json(
            Path(source) / "meta.json",
            {"a": {"root": "", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 1}},
        )
        datasets = load_datasets(Path(source) / "meta.json")
        description = describe(datasets, settings, tokenizer, 1)
        store = Path(source) / "store"
        begin_store(store, description)
        write_part(store, 0, SampleStream(datasets, settings, tokenizer, 0, 1), description["root"])
        finish_store(store)
        shutil.copytree(store, folder, dirs_exist_ok=True)


def _read_row_store(folder: Path) -> None:
    from internvl_megatron.data.row_store import RowStore, _open_part

    _open_part.cache_clear()
    store = RowStore(folder)
    store.check(_settings(), _small_tokenizer())
    for index in range(min(len(store), 5)):
        store.row(index, folder, allow_outside_root=False)


def _write_reference(folder: Path) -> None:
    from internvl_megatron.data.reference_file import ReferencePair, write_reference_file

    pairs = [ReferencePair("pairs", number, "ab12", -1.5, -2.5) for number in range(4)]
    write_reference_file(folder / "reference.jsonl", "weights 1", pairs)


def _read_reference(folder: Path) -> None:
    from internvl_megatron.data.reference_file import ReferenceFile

    ReferenceFile(folder / "reference.jsonl")


def _write_fast_tokenizer(folder: Path) -> None:
    _small_tokenizer().save(folder)


def _read_tokenizer(folder: Path) -> None:
    from internvl_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("how many <img> 東京 🙂?"))


def _write_sentencepiece(folder: Path) -> None:
    import sentencepiece

    from internvl_megatron.data.tokenizer import INTERNVL_TOKENS

    turns = ["<|im_start|>", "<|im_end|>"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 8), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
        user_defined_symbols=turns, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    table = {processor.piece_to_id(name): name for name in ("<unk>", "<s>", "</s>", *turns)}
    table |= {processor.get_piece_size() + place: name for place, name in enumerate(INTERNVL_TOKENS)}
    config = {
        "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>",
        "added_tokens_decoder": {str(index): {"content": name, "special": True} for index, name in table.items()},
        "additional_special_tokens": [*turns, *INTERNVL_TOKENS],
    }  # fmt: skip
    _write_json(folder / "tokenizer_config.json", config)


# Checkpoints


def _write_checkpoint(folder: Path) -> None:
    from internvl_megatron.checkpoint import file_sums, folders

    writing = folders.writing_path(folder, 7)
    (writing / "loader").mkdir(parents=True)
    sums = {
        "loader/replica-00000.json": file_sums.write_file(
            writing / "loader" / "replica-00000.json", b'{"0": {"a": [1]}}'
        )
    }
    files_sum = file_sums.write_sums(writing, sums)
    info = folders.CheckpointInfo(7, 100, 10, "TP1", optimizer_state=True, recent_losses=[1.0], files_sum=files_sum)
    folders.finish(folder, info)


def _read_checkpoint(folder: Path) -> None:
    from internvl_megatron.checkpoint import file_sums, folders
    from internvl_megatron.checkpoint.save_load import _loader_state

    for checkpoint in folders.finished(folder):
        file_sums.find_damage(checkpoint)
        info = folders.read_info(checkpoint)
        assert type(info.step) is int and info.step >= 0, f"step {info.step!r}"
        assert all(isinstance(loss, int | float) for loss in info.recent_losses), f"losses {info.recent_losses!r}"
        _loader_state(checkpoint)


def _repair_checkpoint(folder: Path) -> None:
    from internvl_megatron.checkpoint import file_sums, folders

    for checkpoint in folders.finished(folder):
        try:
            fields = json.loads((checkpoint / folders.MARKER).read_text())
            fields["files_sum"] = zlib.crc32((checkpoint / file_sums.SUMS_FILE).read_bytes())
            inner = {name: value for name, value in fields.items() if name not in ("format_version", "marker_sum")}
            fields["marker_sum"] = folders._sum_of(inner)
            _write_json(checkpoint / folders.MARKER, fields)
        except (ValueError, TypeError, OSError, RecursionError, AttributeError):
            return


def _write_distributed(folder: Path) -> None:
    import torch
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    state = {
        "vision.projector.weight": torch.ones(4, 3),
        "language.embedding.weight": torch.ones(8, 2, dtype=torch.bfloat16),
    }
    save(state, storage_writer=FileSystemWriter(folder, single_file_per_rank=True), no_dist=True)


def _read_distributed(folder: Path) -> None:
    from checkpoint_convert.distributed_checkpoint import DistributedCheckpoint

    checkpoint = DistributedCheckpoint(folder)
    for name in checkpoint.names:
        checkpoint.read(name)


# What runs write


def _write_metrics(folder: Path) -> None:
    rows = [{"step": step, "loss": 1.5, "loss_by_kind": {"text": 1.0}} for step in range(1, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_metrics(folder: Path) -> None:
    from internvl_megatron.watching.metrics import read_metrics

    read_metrics(folder / "metrics.jsonl")


def _write_note(folder: Path) -> None:
    note = {
        "rank": 0,
        "host": "n1",
        "pid": 1,
        "started_ticks": 5,
        "main_thread": 2,
        "place": "decode",
        "since": 1.5,
        "is_stuck": False,
    }
    _write_json(folder / "rank-00000.json", note)
    (folder / "rank-00000.stack").write_text(
        'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in f\n\nCurrent thread 0x2 (most recent call first):\n  File "b.py"\n'
    )


def _read_note(folder: Path) -> None:
    from internvl_megatron.faults.rank_notes import read_note, read_stacks
    from internvl_megatron.faults.stall_report import StuckRank, stall_report

    note = read_note(folder, 0)
    if note is not None:
        stall_report([StuckRank(0, note.host, "", note.place, note.since, tuple(read_stacks(folder, note)))], 2.0)


TARGETS: dict[str, Target] = {
    "safetensors": Target(_write_safetensors, _read_safetensors),
    "model.json": Target(_write_model, _read_model),
    "hugging face config": Target(_write_hf_config, _read_hf_config),
    "run config": Target(_write_run_config, _read_run_config),
    "overrides": Target(_write_overrides, _read_overrides),
    "launch settings": Target(_write_settings, _read_settings),
    "meta": Target(_write_meta, _read_meta),
    "records and index": Target(_write_records, _read_records, _repair_index),
    "images": Target(_write_images, _read_images),
    "row store": Target(_write_row_store, _read_row_store),
    "reference file": Target(_write_reference, _read_reference),
    "fast tokenizer": Target(_write_fast_tokenizer, _read_tokenizer),
    "sentencepiece": Target(_write_sentencepiece, _read_tokenizer),
    "checkpoint": Target(_write_checkpoint, _read_checkpoint, _repair_checkpoint),
    "distributed checkpoint": Target(_write_distributed, _read_distributed),
    "metrics": Target(_write_metrics, _read_metrics),
    "heartbeats": Target(_write_note, _read_note),
}
