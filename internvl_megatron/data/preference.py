"""Pairs of answers to one question, as MMPR has them: records `image, question, chosen, rejected`, and what becomes of them.

A pair is two samples that begin alike, with the question and its images, and end with the chosen and with the rejected answer.
It stays together in one row, and its images are encoded once for both. Samples end where their text ends: upstream's
collator instead hides padding by masking token id 0, which is also Qwen's "!".
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from internvl_megatron.data.members import SampleRecord
from internvl_megatron.data.meta import DatasetEntry
from internvl_megatron.data.records import (
    ImageRng,
    Record,
    Sample,
    SampleError,
    SampleSettings,
    num_supervised,
    parse_record,
    render_sample,
)
from internvl_megatron.data.tokenizer import Tokenizer

FIELDS = ("question", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two samples of the same question and images; those of the rejected one are not listed again."""

    chosen: Sample
    rejected: Sample
    reference: tuple[float, float] | None = None
    """Log-probabilities of the two answers under a reference model, if they are known beforehand."""

    @property
    def samples(self) -> tuple[Sample, Sample]:
        """In the order they have in a row."""
        return self.chosen, self.rejected

    @property
    def num_tokens(self) -> int:
        """Of both samples."""
        return self.chosen.num_tokens + self.rejected.num_tokens

    @property
    def num_tiles(self) -> int:
        """Tiles that are encoded."""
        return self.chosen.num_tiles

    def digest(self) -> str:
        """Of all the language model and the loss see of the pair, and of how its images are cut and changed, in hex."""
        found = hashlib.blake2b(digest_size=8)
        for sample in self.samples:
            for array in (sample.token_ids, sample.labels, sample.positions):
                found.update(np.ascontiguousarray(array, dtype="<i4"))
        for image in self.chosen.images:
            found.update(repr((image.grid, image.num_tiles, image.jpeg_seed)).encode())
        return found.hexdigest()


def parse_pair(raw: dict[str, Any], where: str, entry: DatasetEntry, max_tiles: int) -> tuple[Record, Record]:
    """Check a record of a pair; reads no file.

    Args:
        raw: the JSON object; `question`, `chosen` and `rejected` are strings, `image` as in `parse_record`.
        where: `file:line` or `shard:key` of it.
        entry: the data set it belongs to.
        max_tiles: tiles per question unless the data set has its own number.

    Returns:
        The question with the chosen answer, and with the rejected one.

    Raises:
        SampleError: a field is missing or wrong.
    """
    if "conversations" in raw and "chosen" not in raw:
        raise SampleError(
            "record",
            f"{where}: is a conversation, but loss.kind=mpo trains on pairs {{image, question, chosen, rejected}}; set "
            "loss.kind=next_token, or give pairs",
        )
    for name in FIELDS:
        if not isinstance(raw.get(name), str):
            raise SampleError("record", f"{where}: field '{name}' must be a string, not {str(raw.get(name))[:80]}")
    for name in FIELDS[1:]:
        if not raw[name].strip():
            raise SampleError("record", f"{where}: field '{name}' is empty; drop the record")
    if raw["chosen"] == raw["rejected"]:
        raise SampleError(
            "record", f"{where}: field 'rejected' is the same as 'chosen': there is nothing to prefer; drop the record"
        )
    chosen, rejected = (_with_answer(raw, name, where, entry, max_tiles) for name in FIELDS[1:])
    return chosen, rejected


def render_pair(
    records: tuple[Record, Record], settings: SampleSettings, tokenizer: Tokenizer, image_rng: ImageRng
) -> Pair:
    """Turn the two records of a pair into samples; see `render_sample`. Each may take half of a row.

    Raises:
        SampleError: as `render_sample`, or nothing of an answer is left where the policy cuts long samples.
    """
    chosen, rejected = (render_sample(record, settings, tokenizer, image_rng) for record in records)
    assert chosen.images == rejected.images, "both samples draw the same numbers for their images"
    for name, sample in (("chosen", chosen), ("rejected", rejected)):
        if not num_supervised(sample.labels):
            raise SampleError(
                "truncated answer",
                f"{records[0].where}: cut to half of tokens_per_row {settings.data.tokens_per_row}, nothing is left of the "
                f"answer in field '{name}'; raise tokens_per_row or lower max_tiles",
            )
    nothing = np.empty(0, dtype=np.int32)
    return Pair(chosen, replace(rejected, images=(), image_starts=nothing, tile_starts=nothing))


def _with_answer(raw: Mapping[str, Any], answer: str, where: str, entry: DatasetEntry, max_tiles: int) -> Record:
    """The record as a conversation that ends with one of the answers."""
    turns = [{"from": "human", "value": raw["question"]}, {"from": "gpt", "value": raw[answer]}]
    fields: dict[str, Any] = {**raw, "conversations": turns}
    if isinstance(raw, SampleRecord):
        fields = SampleRecord(fields, raw.members)
    for name in ("question", answer):
        try:
            raw[name].encode()
        except UnicodeEncodeError as error:
            raise SampleError(
                "record", f"{where}: field '{name}' has half a surrogate pair, which is not text; mend the escape"
            ) from error
    return replace(parse_record(fields, where, entry, max_tiles), text_field="question")
