"""A slow sentencepiece tokenizer (`tokenizer.model`): InternLM3's, the language model of InternVL3-9B.

Upstream's tokenizer is code in the checkpoint's folder, which is never run. Its behaviour is made again here from what
is published about it:

* modular_internlm3.py, `InternLM3Tokenizer` (the InternLM3 model proposed for transformers): text is split at the added
  tokens and every part is encoded by sentencepiece by itself, with the normalization and the dummy prefix that
  `tokenizer.model` asks for, whatever stands before it. Llama's `legacy` handling is bypassed; `add_prefix_space` and
  `spaces_for_interleaved_special_tokens` act on decoding only; `add_bos_token` is on unless the folder says otherwise.
* special_tokens_map.json of internlm3-8b-instruct and of a fine-tuned InternVL3-9B: `<s>`, `</s>` (padding as well) and
  the turn tokens, no `<|endoftext|>`; InternVL's nine tokens follow InternLM3's in `additional_special_tokens`.
* generation_config.json of internlm3-8b-instruct: bos 1, eos 2 and 128131, padding 2.

Not verified, and so read from the folder: the ids of all tokens (the nine of InternVL3-9B above all), the number and
the types of the pieces in `tokenizer.model`, and whether it adds a dummy prefix. Not compared: the code that
lies in the released folders (tokenization_internlm3.py). What is not upstream's: the names of special tokens in a text
are text, and decoding gives back the spaces that upstream's drops from the start of a text.
"""

import json
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_megatron.data.tokenizer import GROUNDING_TOKENS, MODEL_FILE, TEMPLATE_TOKENS, Tokenizer
from internvl_megatron.errors import DataError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

CONFIG_FILE = "tokenizer_config.json"
ADDED_TOKENS_FILE = "added_tokens.json"

_OTHER_FILES = ("special_tokens_map.json", "chat_template.jinja")
_CODE_FILES = "tokenization_*.py"
"""Upstream's code, copied for the users of other programs; never imported."""

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPACE_RULES = ("lstrip", "rstrip", "single_word")


@dataclass(frozen=True, slots=True)
class SentencePieceFolder:
    """A tokenizer's folder as it is on the disk, checked."""

    path: Path
    processor: "SentencePieceProcessor"
    """The model of `tokenizer.model`."""
    config: dict[str, Any]
    """`tokenizer_config.json`."""
    added_ids: dict[str, int]
    """Id of each added token. Some are pieces of the model as well, under the same id."""
    special_tokens: frozenset[str]
    """Names that stand for a token only where the template puts it."""

    @property
    def num_pieces(self) -> int:
        """Ids of the model, added tokens not counted."""
        return self.processor.get_piece_size()

    @property
    def num_tokens(self) -> int:
        """All ids: one more than the highest."""
        return max([self.num_pieces - 1, *self.added_ids.values()]) + 1

    def find(self, token: str) -> int | None:
        """Id of a token by its name: an added token, or a piece of the model; None if there is none."""
        return self.added_ids[token] if token in self.added_ids else find_piece(self.processor, token)

    def named_token(self, key: str) -> str | None:
        """Name of the token that the configuration gives as `bos_token`, `pad_token`, ...; None if it gives none."""
        return _token_name(self.config.get(key), f"{self.path / CONFIG_FILE}: {key}")


class SentencePieceTokenizer(Tokenizer):
    """Runs on the `sentencepiece` library.

    What the model itself knows by the name of a special token is made a control piece in memory: sentencepiece finds a
    user-defined piece in any text, and a control piece in none. The ids stay the same.
    """

    def __init__(self, folder: SentencePieceFolder) -> None:
        """Take over a folder that was read."""
        self._folder = folder
        special = {*folder.special_tokens, *TEMPLATE_TOKENS}
        self._processor = _with_control_pieces(folder.processor, {*special, *GROUNDING_TOKENS})
        found = {name: folder.find(name) for name in {*special, *GROUNDING_TOKENS, *folder.added_ids}}
        self._names = {index: name for name, index in found.items() if index is not None}
        """Tokens that the model does not decode."""
        self._special_tokens = {name: index for name, index in found.items() if index is not None and name in special}
        self._special_ids = set(self._special_tokens.values())
        self._plain_ids = {name: index for name, index in folder.added_ids.items() if name not in special}
        """Added tokens that a text may contain."""
        longest_first = sorted(self._plain_ids, key=len, reverse=True)
        self._plain_pattern = (
            re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        )
        adds_bos = folder.config.get("add_bos_token", True)
        super().__init__(
            str(folder.path), folder.named_token("pad_token"), folder.named_token("bos_token") if adds_bos else None
        )

    def __len__(self) -> int:
        """Number of ids, added tokens counted."""
        return self._folder.num_tokens

    @property
    def adds_dummy_prefix(self) -> bool:
        """Whether the model puts a space before every text it encodes."""
        return bool(self._processor.encode("a", out_type=str)[0].startswith("\u2581"))

    def find(self, token: str) -> int | None:
        """Id of an added token or of a piece of the model; None if there is none."""
        return self._folder.find(token)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids: each run of the model's pieces decoded by itself, as it was encoded, and the tokens between."""
        texts: list[str] = []
        run: list[int] = []
        for token_id in map(int, token_ids):
            if token_id in self._names:
                skipped = skip_special_tokens and token_id in self._special_ids
                texts += [self._processor.decode(run), "" if skipped else self._names[token_id]]
                run = []
            elif token_id < self._folder.num_pieces:
                run.append(token_id)
        return "".join([*texts, self._processor.decode(run)])

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer as a Hugging Face folder."""
        copy_folder(self._folder.path, Path(folder))

    def special_ids(self) -> dict[str, int]:
        """Tokens the folder calls special, and those of the template and of grounding."""
        grounding = {name: self._folder.find(name) for name in GROUNDING_TOKENS}
        return {**self._special_tokens, **{name: index for name, index in grounding.items() if index is not None}}

    def _encode_text(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in [text] if self._plain_pattern is None else self._plain_pattern.split(text):
            if piece in self._plain_ids:
                ids.append(self._plain_ids[piece])
            elif piece:
                ids.extend(self._processor.encode(piece))
        return ids


def find_piece(processor: "SentencePieceProcessor", name: str) -> int | None:
    """Id of a piece of a model; None if there is none (sentencepiece gives the id of the unknown piece then)."""
    index = processor.piece_to_id(name)
    return index if processor.id_to_piece(index) == name else None


def read_folder(folder: str | Path) -> SentencePieceFolder:
    """Read and check a sentencepiece tokenizer's folder.

    Raises:
        DataError: a file is missing, broken or not as it should be, or two tokens claim one id or one name two.
    """
    path = Path(folder)
    processor = _read_model(path / MODEL_FILE)
    config = read_json_object(path / CONFIG_FILE)
    _check_switches(config, path / CONFIG_FILE)
    where = path / CONFIG_FILE
    named = [_token_name(config.get(key), f"{where}: {key}") for key in _NAMED_TOKENS]
    listed = [
        _token_name(entry, f"{where}: {key}")
        for key in ("additional_special_tokens", "extra_special_tokens")  # transformers 4 and 5
        for entry in _listed(config.get(key), f"{where}: {key}")
    ]
    special = {name for name in (*named, *listed) if name is not None}
    added: dict[str, int] = {}
    table = _typed(config.get("added_tokens_decoder") or {}, dict, f"{where}: added_tokens_decoder")
    for key, entry in table.items():
        name = _added_token(entry, f"{where}: added_tokens_decoder[{key}]")
        _add(added, name, key, processor, where)
        if entry.get("special", False):
            special.add(name)
    more = path / ADDED_TOKENS_FILE
    for name, index in (read_json_object(more) if more.exists() else {}).items():
        _add(added, _text(name, str(more)), index, processor, more)
    return SentencePieceFolder(path, processor, config, added, frozenset(special))


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a sentencepiece tokenizer into a folder, which is made."""
    target.mkdir(parents=True, exist_ok=True)
    names = [MODEL_FILE, CONFIG_FILE, ADDED_TOKENS_FILE, *_OTHER_FILES, *(p.name for p in source.glob(_CODE_FILES))]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def read_json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that holds an object. Raises `DataError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error}); copy all files of the tokenizer into the folder"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}); copy the file again") from error
    return _typed(content, dict, str(path))


def _read_model(path: Path) -> "SentencePieceProcessor":
    """A model, loaded."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
        for index in range(processor.get_piece_size()):  # the library does not look whether they are text
            processor.id_to_piece(index)
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: is not a sentencepiece model ({error}); copy the file again (a Git LFS pointer is not the file)"
        ) from error
    if processor.unk_id() < 0:
        raise DataError(
            f"{path}: has no piece of type UNKNOWN, which every sentencepiece model has; copy the file again"
        )
    return processor


def _with_control_pieces(processor: "SentencePieceProcessor", names: Collection[str]) -> "SentencePieceProcessor":
    """The model with its pieces of these names turned into control pieces, ids unchanged."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2  # its classes are made at run time, which no type checker sees
    types = model.ModelProto.SentencePiece
    proto = model.ModelProto.FromString(processor.serialized_model_proto())
    for piece in proto.pieces:
        if piece.piece in names and piece.type in (types.NORMAL, types.USER_DEFINED):
            piece.type = types.CONTROL
    changed = SentencePieceProcessor()
    changed.LoadFromSerializedProto(proto.SerializeToString())
    return changed


def _check_switches(config: dict[str, Any], where: Path) -> None:
    """Refuse settings that would change the ids and are not provided for."""
    if config.get("sp_model_kwargs"):
        raise DataError(f"{where}: sp_model_kwargs are not provided for (ids must not be drawn); set them to {{}}")
    if config.get("add_eos_token"):
        raise DataError(f"{where}: add_eos_token is not provided for, the template ends a text; set it to false")
    _typed(config.get("add_bos_token", True), bool, f"{where}: add_bos_token")


def _typed[T](value: Any, kind: type[T], where: str) -> T:
    """The value, if it is of this type."""
    if not isinstance(value, kind):
        raise DataError(f"{where}: must be a {kind.__name__}, not {value!r:.80}; copy the file again")
    return value


def _text(value: Any, where: str) -> str:
    """The value, if it is a text: half a surrogate pair is none."""
    name = _typed(value, str, where)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise DataError(f"{where}: {name!r:.80} is not text; copy the file again")
    return name


def _listed(value: Any, where: str) -> list[Any]:
    """Tokens in a list, or in an object that gives each a name of its own."""
    return list(value.values()) if isinstance(value, dict) else _typed(value or [], list, where)


def _token_name(value: Any, where: str) -> str | None:
    """Name of a token given as a string or as an object with `content`; None if it is null."""
    content = value.get("content") if isinstance(value, dict) else value
    return None if value is None else _text(content, where)


def _added_token(entry: Any, where: str) -> str:
    """Name of an entry of `added_tokens_decoder`."""
    name = _text(_typed(entry, dict, where).get("content"), f"{where}: content")
    rules = [rule for rule in _SPACE_RULES if entry.get(rule, False)]
    if rules:
        raise DataError(f"{where}: {name!r} has {', '.join(rules)}, which is not provided for; set it to false")
    return name


def _add(added: dict[str, int], name: str, index: Any, processor: "SentencePieceProcessor", where: Path) -> None:
    """Enter one added token, unless it contradicts what is known."""
    if not re.fullmatch(r"\d+", str(index)):
        raise DataError(f"{where}: {name!r} has the id {index!r}, which is not a number")
    token_id = int(index)
    owners = {other for other, taken in added.items() if taken == token_id}
    owners |= {processor.id_to_piece(token_id)} if token_id < processor.get_piece_size() else set()
    for other in owners - {name}:
        raise DataError(f"{where}: {name!r} has the id {token_id} of {other!r}; the files are of different tokenizers")
    for known in (added.get(name), find_piece(processor, name)):
        if known not in (None, token_id):
            raise DataError(
                f"{where}: {name!r} has the id {token_id}, but {known} in another place; "
                "the files are of different tokenizers"
            )
    added[name] = token_id
