"""What lmms-eval asks, as the engine takes it: settings of generation, and contexts with pictures or a video.

Follows lmms-eval 0.7.3 (`api/task.py` for the requests, `models/simple/internvl3.py` for where pictures go).
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_megatron.data.conversation import IMAGE_PLACEHOLDER
from internvl_megatron.errors import ConfigError, DataError
from internvl_megatron.evaluate.benchmarks.benchmark import MAX_TILES_OF_ALL_IMAGES
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import GREEDY, Generation, Sampling

MAX_NEW_TOKENS = 1024
"""Where a task does not say: what lmms-eval's InternVL3 has."""
_KNOWN = {"max_new_tokens", "max_gen_toks", "until", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
_KNOWN |= {"repetition_penalty", "seed"}

_logger = logging.getLogger(__name__)


def as_generation(options: Mapping[str, Any]) -> Generation:
    """A task's `generation_kwargs`. Those meant for other models (`image_aspect_ratio`, ...) are named in the log and left out.

    Nothing is drawn where `do_sample` is false, whatever the temperature; without `do_sample` the temperature says.

    Raises:
        ConfigError: a value is wrong, or a beam search is asked for.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := sorted(given.keys() - _KNOWN):
        _logger.warning("generation_kwargs: %s: not known to this engine, left out", ", ".join(unknown))
    if given.get("num_beams", 1) != 1:
        raise ConfigError(f"generation_kwargs: num_beams must be 1, not {given['num_beams']}: there is no beam search")
    until = given.get("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until)
    temperature = _number(given, "temperature", 1.0 if given.get("do_sample") else 0.0)
    sampling = GREEDY
    if given.get("do_sample", True) and temperature > 0:
        sampling = Sampling(
            temperature,
            int(_number(given, "top_k", 0)),
            _number(given, "top_p", 1.0),
            int(_number(given, "seed", 0)),
            _number(given, "repetition_penalty", 1.0),
        )
    elif "repetition_penalty" in given:
        sampling = Sampling(repetition_penalty=_number(given, "repetition_penalty", 1.0))
    longest = _number(given, "max_new_tokens", _number(given, "max_gen_toks", MAX_NEW_TOKENS))
    return Generation(int(longest), sampling=sampling, stop_strings=stops)


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"generation_kwargs: {name} must be a number, not {value!r}")
    return value


def as_prompt(
    context: str, visuals: Sequence[Any] | None, folder: Path, where: str, max_tiles: int, num_frames: int
) -> Prompt:
    """One request as a prompt.

    Args:
        context: text; pictures take the place of its `<image>`, and stand in front of it where there is another number of them.
        visuals: of the document: pictures, or the path of one video.
        folder: where pictures become files.
        where: task and document, for messages.
        max_tiles: of each picture, where there are few.
        num_frames: of a video.

    Raises:
        DataError: one of the visuals is neither.
    """
    visuals = list(visuals or ())
    if len(visuals) == 1 and isinstance(visuals[0], str) and not _is_picture_file(visuals[0]):
        return Prompt(context, video=visuals[0], num_frames=num_frames, where=where)
    paths = []
    for number, visual in enumerate(visuals, 1):
        if isinstance(visual, Image.Image):
            path = folder / f"{number}.ppm"
            visual.convert("RGB").save(path)
            paths.append(str(path))
        elif isinstance(visual, str) and _is_picture_file(visual):
            paths.append(visual)
        else:
            raise DataError(
                f"{where}: visual {number} of {len(visuals)} is a {type(visual).__name__}; this engine sees pictures, or "
                "the path of one video"
            )
    if paths and context.count(IMAGE_PLACEHOLDER) != len(paths):
        context = f"{' '.join([IMAGE_PLACEHOLDER] * len(paths))}\n{context.replace(IMAGE_PLACEHOLDER, '')}"
    tiles = max(1, min(max_tiles, MAX_TILES_OF_ALL_IMAGES // max(1, len(paths))))
    return Prompt(context, tuple(paths), max_tiles=tiles, where=where)


def _is_picture_file(path: str) -> bool:
    return Path(path).suffix.lower() in Image.registered_extensions()
