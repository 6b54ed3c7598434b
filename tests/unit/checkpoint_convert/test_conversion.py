"""Conversions that are killed, shared, run out of space or find somebody else's half-made folder."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoint_convert import conversion as conversion_module
from checkpoint_convert.__main__ import main
from checkpoint_convert.safetensors_writer import TensorSpec, file_bytes, write
from tests.support.huggingface_folders import load_tensors, same_bits, write_tensors

ROOT = Path(__file__).resolve().parents[3]
FILE_GB = "0.00004"

# A process that converts, slowly, and may do something before the n-th parameter is read.
CHILD = """
import os, resource, signal, sys, time
sys.path.insert(0, {root!r})
from checkpoint_convert.sources import HuggingFaceSource
read, count = HuggingFaceSource.read, 0
def slowly(self, name):
    global count
    count += 1
    time.sleep({pause})
    if count == {when}:
        {what}
    return read(self, name)
HuggingFaceSource.read = slowly
from checkpoint_convert.__main__ import main
sys.exit(main({arguments!r}))
"""


def start(*arguments, pause=0.0, when=0, what="pass"):
    code = CHILD.format(root=str(ROOT), pause=pause, when=when, what=what, arguments=[str(a) for a in arguments])
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def convert(source, target):
    return main(["hf-to-megatron", str(source), str(target), "--file-gb", FILE_GB])


@pytest.fixture
def expected(chat_folder, tmp_path):
    """A source, and what its conversion must give."""
    source = chat_folder()
    assert convert(source, tmp_path / "expected") == 0
    return source, load_tensors(tmp_path / "expected")


def assert_whole(target, tensors):
    found = load_tensors(target)
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)
    assert not target.with_name(f"{target.name}.partial").exists()
    kinds = {path.suffix for path in target.iterdir()}
    assert kinds == {".json", ".safetensors", ""}, f"nothing is left over: {kinds}"
    assert not list(target.glob("*.lock"))


def test_killed_halfway_it_continues(expected, tmp_path):
    source, tensors = expected
    target, partial = tmp_path / "ours", tmp_path / "ours.partial"
    child = start(
        "hf-to-megatron", source, target, "--file-gb", FILE_GB, when=30, what="os.kill(os.getpid(), signal.SIGKILL)"
    )
    child.communicate()
    assert child.returncode == -9
    assert not target.exists()
    finished = {path.name: path.stat().st_ino for path in partial.glob("*.safetensors")}
    assert finished
    assert list(partial.glob("*.writing"))
    assert main(["inspect", str(partial)]) == 2, "half a conversion is no checkpoint"
    assert convert(source, target) == 0
    assert_whole(target, tensors)
    again = {path.name: path.stat().st_ino for path in target.glob("*.safetensors")}
    assert {name: again[name] for name in finished} == finished, "finished files are not written again"


def test_an_export_killed_before_its_only_file_is_no_checkpoint(chat_folder, tmp_path):
    source, target = chat_folder(), tmp_path / "theirs"
    arguments = ("megatron-to-hf", source, target, "--layout", "transformers")
    child = start(*arguments, when=60, what="os.kill(os.getpid(), signal.SIGKILL)")
    child.communicate()
    assert child.returncode == -9
    partial = tmp_path / "theirs.partial"
    assert (partial / "config.json").is_file()
    assert not list(partial.glob("*.safetensors"))
    assert main([str(argument) for argument in arguments]) == 0
    assert main(["check", str(source), str(target)]) == 0


@pytest.mark.slow
def test_several_processes_share_it(expected, tmp_path):
    source, tensors = expected
    target = tmp_path / "ours"
    children = [start("hf-to-megatron", source, target, "--file-gb", FILE_GB, pause=0.02) for _ in range(3)]
    printed = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], printed
    assert_whole(target, tensors)
    assert convert(source, target) == 0, "the same command again finds it done"


@pytest.mark.slow
def test_a_killed_helper_does_not_stop_the_others(expected, tmp_path):
    source, tensors = expected
    target = tmp_path / "ours"
    arguments = ("hf-to-megatron", source, target, "--file-gb", FILE_GB)
    victim = start(*arguments, pause=0.02, when=10, what="os.kill(os.getpid(), signal.SIGKILL)")
    survivor = start(*arguments, pause=0.02)
    victim.communicate()
    out, err = survivor.communicate()
    assert (victim.returncode, survivor.returncode) == (-9, 0), (out, err)
    assert_whole(target, tensors)


def test_a_full_disk_keeps_what_is_finished(expected, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the middle of the one large file."""
    source, tensors = expected
    target = tmp_path / "ours"
    arguments = ("hf-to-megatron", source, target, "--file-gb", FILE_GB)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))"
    child = start(*arguments, when=20, what=limit)
    _, err = child.communicate()
    assert child.returncode == 2
    assert "no space left" in err
    assert "run the same command again" in err
    assert "Traceback" not in err
    assert not target.exists()
    assert list((tmp_path / "ours.partial").glob("*.safetensors"))
    assert convert(source, target) == 0
    assert_whole(target, tensors)


def test_too_little_space_is_said_before_anything_is_written(chat_folder, tmp_path, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(conversion_module.shutil, "disk_usage", lambda _path: usage(10**9, 10**9, 10**6))
    assert convert(chat_folder(), tmp_path / "ours") == 2
    assert "GB and" in capsys.readouterr().err
    assert not list((tmp_path / "ours.partial").glob("*.safetensors*"))


def test_another_conversion_is_not_continued(expected, tmp_path, capsys):
    source, _ = expected
    target = tmp_path / "ours"
    child = start("hf-to-megatron", source, target, "--file-gb", FILE_GB, when=30, what="os._exit(1)")
    child.communicate()
    changed = {name: tensor.clone() for name, tensor in load_tensors(source).items()}
    changed["mlp1.3.bias"].zero_()
    write_tensors(source, changed, 1)
    assert convert(source, target) == 2
    assert "is another conversion that was not finished" in capsys.readouterr().err
    assert main(["hf-to-megatron", str(source), str(target)]) == 2, "another division into files is another conversion"
    shutil.rmtree(tmp_path / "ours.partial")
    assert convert(source, target) == 0
    assert same_bits(load_tensors(target)["vision.projector.linear_2.bias"], changed["mlp1.3.bias"])


def test_files_of_unknown_origin_are_neither_taken_over_nor_removed(expected, tmp_path, capsys):
    """A folder without its job file: of another program, or somebody's own."""
    source, _ = expected
    shutil.copytree(tmp_path / "expected", tmp_path / "ours.partial")
    (tmp_path / "ours.partial" / "conversion.json").unlink()
    before = {path.name for path in (tmp_path / "ours.partial").iterdir()}
    assert convert(source, tmp_path / "ours") == 2
    assert "holds files that no conversion has left there" in capsys.readouterr().err
    assert before <= {path.name for path in (tmp_path / "ours.partial").iterdir()}
    assert not (tmp_path / "ours").exists()


def test_a_damaged_job_file(expected, tmp_path, capsys):
    source, _ = expected
    (tmp_path / "ours.partial").mkdir()
    (tmp_path / "ours.partial" / "conversion.json").write_text("{")
    assert convert(source, tmp_path / "ours") == 2
    assert "remove the folder to start again" in capsys.readouterr().err


def test_files_are_what_the_library_reads(tmp_path):
    """Our writer against the safetensors library, with odd sizes, one value and none."""
    specs = [
        TensorSpec("a", torch.bfloat16, (3, 5)),
        TensorSpec("b.weight", torch.float32, (1,)),
        TensorSpec("none", torch.float16, (0, 4)),
        TensorSpec("é", torch.float16, (2, 1, 2)),
    ]
    tensors = [torch.randn(spec.shape).to(spec.dtype) for spec in specs]
    tensors[0] = tensors[0].t().contiguous().t()  # not in row order
    counted = []
    path = tmp_path / "x.safetensors"
    write(path, specs, iter(tensors), counted.append)
    assert path.stat().st_size == file_bytes(specs)
    assert sum(counted) == sum(spec.num_bytes for spec in specs)
    with safe_open(path, "pt") as file:
        assert list(file.keys()) == sorted(spec.name for spec in specs)
        for spec, tensor in zip(specs, tensors, strict=True):
            assert same_bits(file.get_tensor(spec.name), tensor)
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + header_bytes) % 8 == 0
    assert json.loads(path.read_bytes()[8 : 8 + header_bytes])["__metadata__"] == {"format": "pt"}
    assert path.stat().st_size == 8 + header_bytes + sum(spec.num_bytes for spec in specs)
