"""Files of a reference's log-probabilities: what is written comes back, and what is wrong is said."""

from pathlib import Path

import pytest

from internvl_megatron.data.reference_file import ReferenceFile, ReferencePair, write_reference_file
from internvl_megatron.errors import DataError

PAIRS = [ReferencePair("one", 0, "ab", -0.1, -1e-17), ReferencePair("one", 7, "cd", -123.456789012345678, -3.0)]


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "reference.jsonl"
    write_reference_file(path, "0123", PAIRS)
    file = ReferenceFile(path)
    file.check_weights("0123")
    assert len(file) == 2
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"
    with pytest.raises(DataError, match="is of a model with weights 0123, and the run starts from 4567"):
        file.check_weights("4567")


@pytest.mark.parametrize(
    ("line", "content", "message"),
    [
        (0, "{}", "its first line is not that of a reference file"),
        (0, "", ":1: is not valid JSON"),
        (1, "[]", ":2: must be a JSON object"),
        (2, '{"dataset": "one"', ":3: is not valid JSON"),
        (2, '{"dataset": "one", "record": 1, "digest": "ab", "chosen": "x", "rejected": 0.5}', ":3: field 'chosen'"),
    ],
)
def test_wrong_files(tmp_path: Path, line: int, content: str, message: str) -> None:
    path = tmp_path / "reference.jsonl"
    write_reference_file(path, "0123", PAIRS)
    lines = path.read_text().splitlines()
    lines[line] = content
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        ReferenceFile(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        ReferenceFile(tmp_path / "none.jsonl")
