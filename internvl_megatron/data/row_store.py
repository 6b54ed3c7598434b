"""Packed rows on disk: a zarr store that `tools/pack_dataset.py` writes and the trainer reads like an annotation file.

    STORE/store.json         what the rows are and how they were made; once all parts are there, how many rows each has
    STORE/meta.json          a meta file whose only data set is the store
    STORE/part-00000.zarr    rows of one part, a zarr group

Arrays of a part of R rows of T tokens, in a chunk for each row, 64 of them in a file: `token_ids`, `targets` (labels of the
next token, -100 where it is not trained on), `weights` and `positions` [R, T]. What differs in length lies one row behind the
other: `cu_seqlens` (bounds of the samples, then of the padding), `image_starts`, `tile_starts`, `images` (how each is cut, as
JSON), `sources` [n, 3] (data set, record and pass of each sample); row i has entries `bounds`[i] to [i + 1] of each.
`digests` [R, 16] is a BLAKE2b of each row, compared whenever it is read.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_megatron.data.files import FileError, locate
from internvl_megatron.data.images import ImageRef
from internvl_megatron.data.records import SampleSettings
from internvl_megatron.data.rows import Row, SampleSource
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.errors import DataError
from internvl_megatron.object_store import is_url
from internvl_megatron.typed_object import typed_object

if TYPE_CHECKING:
    import zarr

STORE_FILE = "store.json"
META_FILE = "meta.json"
FORMAT = "internvl_megatron packed rows"
VERSION = 1

PADDED = {"token_ids": "int32", "targets": "int32", "weights": "float32", "positions": "int32"}
"""Arrays [rows, tokens] and their types."""
RAGGED = {
    "cu_seqlens": "int32",
    "image_starts": "int32",
    "tile_starts": "int32",
    "images": "uint8",
    "sources": "int64",
}
"""Arrays of rows of any length, in the order of their columns in `bounds`."""
DIGEST_BYTES = 16

FIXED_SETTINGS = (
    "tokens_per_row", "min_tiles", "max_tiles", "use_thumbnail", "min_video_frames", "max_video_frames", "system_prompt",
    "v2pe", "v2pe_numerator", "sample_multiple_tokens", "special_tokens_in_text",
)  # fmt: skip
"""Settings of `DataConfig` that are in the rows, so that a run must have the same."""

_OPEN_PARTS = 64
"""Parts kept open: a few kilobytes and no file descriptor each."""

_PROBES = (
    "The quick brown fox's 12 345 jumps\n\n  over: naïve façade, Straße, 東京の鳥, привет, 🙂",
    "def f(x):\n    return x**2 / 3.14  # <|im_end|> <box>[[1, 2, 3, 4]]</box>",
)
"""Texts whose tokens tell tokenizers apart, however their files are written."""


def is_row_store(path: Path) -> bool:
    """Whether a path is that of a store."""
    return (path / STORE_FILE).is_file()


def fixed_settings(settings: SampleSettings, tokenizer: Tokenizer) -> dict[str, Any]:
    """What rows depend on and every run that reads them must share, as JSON."""
    return {
        **{f"data.{name}": getattr(settings.data, name) for name in FIXED_SETTINGS},
        "loss.weighting": settings.weighting,
        "tile_pixels": settings.tile_pixels,
        "tokens_per_tile": settings.tokens_per_tile,
        "tokenizer": _tokenizer_digest(tokenizer),
    }


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Names the behaviour of a tokenizer: its size, its special tokens, and what it makes of some texts."""
    behaviour = [len(tokenizer), sorted(tokenizer.special_ids().items()), [tokenizer.encode(text) for text in _PROBES]]
    digest = hashlib.blake2b(json.dumps(behaviour).encode(), digest_size=8).hexdigest()
    return f"{len(tokenizer)} tokens, {digest}"


@dataclass(frozen=True, slots=True)
class StoredRow:
    """A row as it lies in a part; names of images are relative to the store's root."""

    padded: Mapping[str, np.ndarray]
    """[T] of each of `PADDED`."""
    ragged: Mapping[str, np.ndarray]
    """[n] of each of `RAGGED`; sources [n, 3]."""

    @classmethod
    def of(cls, row: Row, root: str | None) -> "StoredRow":
        """A row whose images below `root` are named relative to it."""
        lengths = row.segment_lengths
        images = [replace(image, path=_relative(image.path, root)) for image in row.images]
        return cls(
            {name: np.asarray(getattr(row, name), dtype=kind) for name, kind in PADDED.items()},
            {
                "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
                "image_starts": row.image_starts.astype(np.int32),
                "tile_starts": row.tile_starts.astype(np.int32),
                "images": np.frombuffer(json.dumps([image.fields() for image in images]).encode(), dtype=np.uint8),
                "sources": np.array(
                    [(source.dataset, source.record, source.pass_number) for source in row.sources], dtype=np.int64
                ).reshape(-1, 3),
            },
        )

    def row(self) -> Row:
        """The row, its images named as here. Raises ValueError, TypeError or IndexError if its parts do not fit."""
        bounds, tokens = self.ragged["cu_seqlens"], len(self.padded["token_ids"])
        images = tuple(ImageRef.from_fields(fields) for fields in json.loads(bytes(self.ragged["images"])))
        if bounds[0] != 0 or bounds[-1] != tokens or (np.diff(bounds) <= 0).any():
            raise ValueError(f"samples at {bounds.tolist()} are not those of {tokens} tokens")
        if not 0 <= len(bounds) - 1 - len(self.ragged["sources"]) <= 1:
            raise ValueError(f"{len(self.ragged['sources'])} sources for {len(bounds) - 1} samples and padding")
        if len(self.ragged["tile_starts"]) != sum(image.num_tiles for image in images):
            raise ValueError(f"{len(self.ragged['tile_starts'])} places for other numbers of tiles")
        return Row(
            token_ids=self.padded["token_ids"],
            targets=self.padded["targets"],
            weights=self.padded["weights"],
            positions=self.padded["positions"],
            segment_lengths=np.diff(bounds).astype(np.int32),
            sources=tuple(SampleSource(*source) for source in self.ragged["sources"].tolist()),
            images=images,
            image_starts=self.ragged["image_starts"],
            tile_starts=self.ragged["tile_starts"],
        )

    def digest(self) -> np.ndarray:
        """uint8 [DIGEST_BYTES] over all of it."""
        found = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for name, kind in PADDED.items():
            found.update(np.ascontiguousarray(self.padded[name], dtype=np.dtype(kind).newbyteorder("<")))
        for name, kind in RAGGED.items():
            array = np.ascontiguousarray(self.ragged[name], dtype=np.dtype(kind).newbyteorder("<"))
            found.update(len(array).to_bytes(8, "little"))
            found.update(array)
        return np.frombuffer(found.digest(), dtype=np.uint8)


def _relative(path: str, root: str | None) -> str:
    """A path below the root (as `common_root` gives it), relative to it; any other in full."""
    if not is_url(path):
        path = os.path.realpath(path) + ("/" if path.endswith("/") else "")  # a slash marks a folder of frames
    return path.removeprefix(f"{root.rstrip('/')}/") if root else path


@dataclass(frozen=True, slots=True)
class PartSummary:
    """What is in a part; kept with it and in `store.json`."""

    rows: int
    samples: int
    tokens: int
    """Of samples, padding not counted."""
    supervised_tokens: int
    tiles: int
    images: int
    skipped: dict[str, int]
    """Samples left out, by kind of error."""
    digest: str
    """Of the digests of all rows."""


@dataclass(frozen=True, slots=True)
class ListedPart:
    """What `store.json` says of a part."""

    rows: int
    digest: str


def digest_of_rows(digests: Iterable[np.ndarray]) -> str:
    """One digest for those of a part's rows, in their order."""
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for digest in digests:
        found.update(digest.tobytes())
    return found.hexdigest()


def part_name(number: int) -> str:
    """Folder of a part."""
    return f"part-{number:05d}.zarr"


class Part:
    """A part that is read."""

    def __init__(self, folder: Path) -> None:
        """Open it. Raises `DataError` if it is not there or not whole."""
        import zarr  # takes a quarter of a second, and brings fsspec: not for runs without packed rows
        from zarr.storage import LocalStore

        self.folder = folder
        try:
            group = zarr.open_group(LocalStore(folder, read_only=True), mode="r")
            self._arrays = {name: _array(group, name) for name in (*PADDED, *RAGGED)}
            self._bounds = np.asarray(_array(group, "bounds")[:])
            self.digests = np.asarray(_array(group, "digests")[:])
            """uint8 [R, DIGEST_BYTES], as they were written."""
            self.summary = typed_object(PartSummary, dict(group.attrs))
        except Exception as error:  # zarr and its codecs have many of their own
            raise DataError(f"{folder}: is no part of a store that can be read ({error}); {_AGAIN}") from error

    def row(self, index: int) -> StoredRow:
        """Row `index`, held against its digest. Raises `DataError` if it is damaged."""
        try:
            padded = {name: np.asarray(self._arrays[name][index]) for name in PADDED}
            start, end = self._bounds[index].tolist(), self._bounds[index + 1].tolist()
            ragged = {
                name: np.asarray(self._arrays[name][start[column] : end[column]]) for column, name in enumerate(RAGGED)
            }
            row = StoredRow(padded, ragged)
            is_whole = np.array_equal(row.digest(), self.digests[index])
        except Exception as error:  # see above
            raise DataError(f"{self.folder}: row {index} cannot be read ({error}); {_AGAIN}") from error
        if not is_whole:
            raise DataError(f"{self.folder}: row {index} is damaged (its checksum differs); {_AGAIN}")
        return row


_AGAIN = "delete this part and run tools/pack_dataset.py again, which makes it anew"


def _array(group: "zarr.Group", name: str) -> "zarr.Array":
    found = group[name]
    if not hasattr(found, "shape"):
        raise TypeError(f"{name} is no array")
    return found  # pyright: ignore[reportReturnType]


@lru_cache(maxsize=_OPEN_PARTS)
def _open_part(folder: Path) -> Part:
    return Part(folder)


class RowStore:
    """A store as a data set: rows by number, over all parts. It holds no descriptor and may be shared by threads."""

    def __init__(self, folder: Path) -> None:
        """Read what `store.json` says.

        Raises:
            DataError: there is no store, or one that is not finished or not of this version.
        """
        self.folder = folder
        self.description = read_description(folder)
        if self.description.get("parts") is None:
            raise DataError(f"{folder}: is not finished; run tools/pack_dataset.py again with the same arguments")
        try:
            parts = [typed_object(ListedPart, part) for part in self.description["parts"]]
        except (TypeError, ValueError) as error:
            raise DataError(f"{folder / STORE_FILE}: 'parts' is wrong ({error!r}); {_AGAIN}") from error
        self._ends = list(accumulate(max(0, part.rows) for part in parts))
        self._digests = [part.digest for part in parts]
        self.digest = hashlib.blake2b(json.dumps(self._digests).encode(), digest_size=DIGEST_BYTES).hexdigest()
        """Of all rows."""

    def __len__(self) -> int:
        """Number of rows."""
        return self._ends[-1] if self._ends else 0

    def where(self, index: int) -> str:
        """Part and row of row `index`, for messages."""
        part, row = self._place(index)
        return f"{self.folder / part_name(part)}: row {row}"

    def row(self, index: int, root: str | Path, allow_outside_root: bool) -> Row:
        """A row as it was packed; sources are those of the run that packed it.

        Args:
            index: of the row.
            root: folder or URL that names of images are relative to.
            allow_outside_root: see `files.locate`.

        Raises:
            FileError: an image lies outside the root.
            DataError: the row or its part is damaged.
        """
        number, place = self._place(index)
        part = _open_part(self.folder / part_name(number))
        if part.summary.digest != self._digests[number]:
            raise DataError(f"{part.folder}: is not the part that {STORE_FILE} lists; {_AGAIN}")
        stored = part.row(place)
        try:
            row = stored.row()
        except (ValueError, TypeError, IndexError) as error:
            raise DataError(f"{self.where(index)}: is no row ({error}); {_AGAIN}") from error
        try:
            images = [replace(image, path=locate(root, image.path, allow_outside_root)) for image in row.images]
        except FileError as error:
            raise FileError(error.fault, f"{self.where(index)}: {error}") from error
        return replace(row, images=tuple(images))

    def check(self, settings: SampleSettings, tokenizer: Tokenizer) -> None:
        """Refuse a run whose settings are not those of the rows.

        Raises:
            DataError: with every difference.
        """
        packed, now = self.description.get("fixed"), fixed_settings(settings, tokenizer)
        tiles = self.description.get("tiles_per_row")
        if not isinstance(packed, dict) or type(tiles) is not int:
            raise DataError(f"{self.folder / STORE_FILE}: 'fixed' or 'tiles_per_row' is wrong; {_AGAIN}")
        differences = [
            f"{name} was {packed.get(name)!r}, is {value!r}"
            for name, value in now.items()
            if packed.get(name) != value
        ]
        if tiles > settings.data.tiles_per_row:
            differences.append(f"data.tiles_per_row was {tiles}, is {settings.data.tiles_per_row}, which is less")
        if differences:
            raise DataError(
                f"{self.folder}: its rows were packed otherwise ({'; '.join(differences)}); give the run the settings they "
                "were packed with, or pack again"
            )

    def _place(self, index: int) -> tuple[int, int]:
        """(part, row in it) of row `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (self._ends[part - 1] if part else 0)


def read_description(folder: Path) -> dict[str, Any]:
    """What `store.json` says. Raises `DataError` if it is not there or not of this version."""
    path = folder / STORE_FILE
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); is it a store of packed rows?") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error}); pack again into an empty folder") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: is not the description of a store of packed rows")
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: is of version {content.get('version')}, this program reads version {VERSION}; pack again"
        )
    return content


def common_root(roots: Iterable[str | Path]) -> str | None:
    """The lowest folder or URL that holds all roots; None if there is none."""
    names = [str(root) for root in roots]
    if not any(map(is_url, names)):
        parts = [Path(os.path.realpath(name)).parts for name in names]
    elif all(map(is_url, names)):
        parts = [tuple(name.rstrip("/").split("/")) for name in names]
    else:
        return None
    shared: list[str] = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        shared.append(same[0])
    if any(map(is_url, names)):
        return "/".join(shared) if len(shared) > 2 else None  # `scheme:`, nothing, and the store's name
    return str(Path(*shared)) if shared else None
