"""Log-probabilities of a reference model for pairs of answers, found ahead of a run: a file of JSON lines.

The first line says which weights they are of and with what settings pairs were made. Every other line is a pair: data set,
record, a digest of the pair (`Pair.digest`), and the log-probabilities of its two answers. A run that reads it compares the
weights it starts from, and of each pair the digest: data, tokenizer or cutting that have changed are seen.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl_megatron.data.preference import Pair
from internvl_megatron.errors import DataError

FORMAT_VERSION = 1
MAKE_ANEW = "make the file anew (python -m tools.reference_logprobs)"


@dataclass(frozen=True)
class ReferencePair:
    """One pair's line."""

    dataset: str
    record: int
    digest: str
    chosen: float
    rejected: float


class ReferenceFile:
    """A file read into memory."""

    def __init__(self, path: str | Path) -> None:
        """Read it.

        Raises:
            DataError: it cannot be read, or a line is wrong.
        """
        self.path = Path(path)
        self._pairs: dict[tuple[str, int], ReferencePair] = {}
        try:
            with self.path.open(encoding="utf-8") as file:
                self.weights = _weights(self._parse(file.readline(), 1), self.path)
                for number, line in enumerate(file, start=2):
                    pair = self._pair(self._parse(line, number), number)
                    self._pairs[pair.dataset, pair.record] = pair
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.path}: cannot be read ({error}); {MAKE_ANEW}") from error

    def __len__(self) -> int:
        """Pairs in it."""
        return len(self._pairs)

    def check_weights(self, weights: str) -> None:
        """See that a model is the one of the file.

        Raises:
            DataError: it is another one.
        """
        if weights != self.weights:
            raise DataError(
                f"{self.path}: is of a model with weights {self.weights}, and the run starts from {weights} "
                f"(checkpoint.load); start from the same weights in the same dtype, or {MAKE_ANEW}"
            )

    def added_to(self, pair: Pair, dataset: str, record: int, where: str) -> Pair:
        """The pair with its log-probabilities.

        Raises:
            DataError: the file does not have it, or had another one in its place.
        """
        found = self._pairs.get((dataset, record))
        if found is None:
            raise DataError(f"{where}: is not in mpo.reference_file {self.path} (data set {dataset!r}); {MAKE_ANEW}")
        if found.digest != pair.digest():
            raise DataError(
                f"{where}: was another pair when mpo.reference_file {self.path} was made: its text, the tokenizer, how images "
                f"are cut, or data_augment has changed; restore it, or {MAKE_ANEW}"
            )
        return replace(pair, reference=(found.chosen, found.rejected))

    def _parse(self, line: str, number: int) -> dict[str, Any]:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.path}:{number}: is not valid JSON ({error}); {MAKE_ANEW}") from error
        if not isinstance(fields, dict):
            raise DataError(f"{self.path}:{number}: must be a JSON object; {MAKE_ANEW}")
        return fields

    def _pair(self, fields: dict[str, Any], number: int) -> ReferencePair:
        kinds = {"dataset": str, "record": int, "digest": str, "chosen": float, "rejected": float}
        for name, kind in kinds.items():
            if not isinstance(fields.get(name), kind):
                raise DataError(
                    f"{self.path}:{number}: field '{name}' must be a {kind.__name__}, not {str(fields.get(name))[:80]}; "
                    f"{MAKE_ANEW}"
                )
        return ReferencePair(**{name: fields[name] for name in kinds})


def write_reference_file(path: str | Path, weights: str, pairs: Iterable[ReferencePair]) -> None:
    """Write a file; it appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format_version": FORMAT_VERSION, "weights": weights}) + "\n")
        file.writelines(json.dumps(vars(pair)) + "\n" for pair in pairs)
    partial.replace(path)


def _weights(fields: dict[str, Any], path: Path) -> str:
    if fields.get("format_version") != FORMAT_VERSION or not isinstance(fields.get("weights"), str):
        raise DataError(
            f"{path}: its first line is not that of a reference file of version {FORMAT_VERSION}; {MAKE_ANEW}"
        )
    return fields["weights"]
