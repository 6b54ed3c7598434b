"""Broken files are taken or refused by whatever reads them, and the fuzzer notices when they are not."""

import os
import pickle
import random
import time
from pathlib import Path

import pytest

from internvl_megatron.errors import DataError
from tools.fuzz import fuzz, main
from tools.fuzz_mutations import mutate
from tools.fuzz_targets import TARGETS, Target

pytestmark = pytest.mark.parallel

NUM_CASES, NUM_CASES_OF_SLOW_READERS = 60, 20
SLOW_READERS = ("fast tokenizer", "sentencepiece", "images", "row store")


@pytest.mark.parametrize("name", TARGETS)
def test_broken_files_are_taken_or_refused(name: str) -> None:
    count = NUM_CASES_OF_SLOW_READERS if name in SLOW_READERS else NUM_CASES
    outcome = fuzz(name, TARGETS[name], range(count), seed=1)
    assert not outcome.faults, "\n".join(fault.text for fault in outcome.faults)
    assert outcome.accepted + outcome.refused == count


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_ten_thousand_broken_files(name: str) -> None:
    outcome = fuzz(name, TARGETS[name], range(10_000), seed=2)
    assert not outcome.faults, "\n".join(fault.text for fault in outcome.faults)


def write_number(folder: Path) -> None:
    (folder / "number.txt").write_text("7")


def read_good_alone(folder: Path) -> bool:
    """Whether this is the good file, which every reader below takes."""
    return (folder / "number.txt").read_bytes() == b"7"


def raise_another_error(folder: Path) -> None:
    if not read_good_alone(folder):
        raise KeyError("number")


def refuse(folder: Path) -> None:
    if not read_good_alone(folder):
        raise DataError("no number")


def die(folder: Path) -> None:
    if not read_good_alone(folder):
        os.abort()


def hang(folder: Path) -> None:
    while not read_good_alone(folder):
        time.process_time()


def write_beside(folder: Path) -> None:
    if not read_good_alone(folder):
        (folder.parent.parent / "no such folder" / "x").write_text("x")


def start_a_program(folder: Path) -> None:
    if not read_good_alone(folder):
        os.system("true")


def unpickle(folder: Path) -> None:
    if not read_good_alone(folder):
        pickle.loads(b"cos\nsystem\n.")


def take_all_memory(folder: Path) -> None:
    if not read_good_alone(folder):
        bytearray(2**35)


@pytest.mark.parametrize(
    ("read", "found"),
    [
        (raise_another_error, "KeyError: 'number'"),
        (die, "killed by SIGABRT"),
        (hang, "more than 0.5 CPU seconds"),
        (write_beside, "to write"),
        (start_a_program, "os.system"),
        (unpickle, "unpickled os.system"),
        (take_all_memory, "MemoryError"),
    ],
)
def test_faults_are_found(read, found: str, tmp_path: Path) -> None:
    target = Target(write_number, read, cpu_seconds=0.5)
    outcome = fuzz("number", target, range(6), seed=0, keep=tmp_path)
    assert outcome.faults and all(found in fault.text for fault in outcome.faults), outcome
    assert len(outcome.faults) + outcome.accepted == 6, "a process that dies costs its own case"
    kept = tmp_path / f"number-0-{outcome.faults[0].case}" / "number.txt"
    assert kept.read_bytes() != b"7", "the file of a fault can be looked at"


def test_an_error_that_is_documented_is_none() -> None:
    outcome = fuzz("number", Target(write_number, refuse), range(20), seed=0)
    assert not outcome.faults and outcome.refused > 10


def test_changes_are_always_the_same_and_of_many_kinds() -> None:
    content = b'{"a": [1, "x"], "b": {"c": 2.5}}'
    changed = [mutate(content, random.Random(seed)) for seed in range(300)]
    assert changed == [mutate(content, random.Random(seed)) for seed in range(300)]
    assert len(set(changed)) > 200
    assert any(b"../" in one for one in changed) and any(len(one) > 50_000 for one in changed)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["metrics", "--cases", "5"]) == 0
    assert "metrics" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["nothing of this name"])
