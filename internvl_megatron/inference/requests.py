"""A prompt on its way to an answer: tokens, positions and images, made by the training pipeline's own template and tiling."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.conversation import Turn, answer_header, place_frames, render_prompt
from internvl_megatron.data.files import is_folder
from internvl_megatron.data.images import MAX_IMAGE_PIXELS, ImageRef, choose_files, image_size
from internvl_megatron.data.positions import UNITS_PER_POSITION, v2pe_numerators
from internvl_megatron.data.tiling import choose_grid, num_tiles
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.data.video import VideoFrames, check_video
from internvl_megatron.errors import ConfigError, DataError
from internvl_megatron.inference.answer_text import AnswerText
from internvl_megatron.inference.prompt import End, Prompt
from internvl_megatron.inference.settings import Generation

DEFAULT_GENERATION = Generation()


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt of n tokens, i of them of images."""

    token_ids: np.ndarray
    """int32 [n]."""
    positions: np.ndarray
    """int32 [n], in units of 1/256."""
    images: tuple[ImageRef, ...]
    image_places: np.ndarray
    """int64 [i], places of the image tokens, ascending."""

    def next_positions(self, first: int, count: int) -> np.ndarray:
        """Positions of tokens `first` and on behind the prompt: they go on in whole ones (spec: V2PE generation)."""
        steps = np.arange(first + 1, first + count + 1, dtype=np.int32) * UNITS_PER_POSITION
        return self.positions[-1] + steps


@dataclass(eq=False)
class Request:
    """A prompt, and the answer so far."""

    number: int
    """Tells it from the others that are under way; what it means is up to who has made it."""
    rendered: RenderedPrompt
    """Shared by requests that differ in their seeds and settings alone."""
    settings: Generation = DEFAULT_GENERATION
    seed: tuple[int, ...] = ()
    """What its draws depend on, beside the step."""
    text: AnswerText | None = None
    """Grows with the answer, where somebody waits for text or it may hold the end."""
    embeddings: Tensor | None = None
    """[i, D] for the image tokens, on the first stage while the prompt is computed."""
    answer_ids: list[int] = field(default_factory=list)
    end: End | None = None
    """How the answer ended; None = it has not."""

    @property
    def most_tokens(self) -> int:
        """Of prompt and answer, when the answer is as long as it may be."""
        return len(self.rendered.token_ids) + self.settings.max_new_tokens

    @property
    def num_cached(self) -> int:
        """Tokens that have been through the model: all but the newest."""
        return len(self.rendered.token_ids) + len(self.answer_ids) - 1

    @property
    def token_ids(self) -> np.ndarray:
        """int64, prompt and answer."""
        return np.concatenate([self.rendered.token_ids, np.array(self.answer_ids, dtype=np.int64)])


class Renderer:
    """Makes tokens of prompts as training does; of their images only the headers are read."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, max_positions: int) -> None:
        """Prepare; positions from `max_positions` on are refused."""
        self._config = config
        self._tokenizer = tokenizer
        self._max_positions = max_positions

    def render_all(self, prompts: Sequence[Prompt], v2pe_numerator: int, max_new_tokens: int) -> list[RenderedPrompt]:
        """Every prompt's tokens; the same object for prompts that differ in their seeds alone.

        Raises:
            DataError: an image cannot be read, or images and `<image>` differ in number; names the prompt.
            ConfigError: the stride is out of its range, or prompt and answer would be longer than the context.
        """
        if not 1 <= v2pe_numerator <= UNITS_PER_POSITION:
            raise ConfigError(
                f"v2pe_numerator: must be 1 to {UNITS_PER_POSITION} (delta 1/256 to 1), not {v2pe_numerator}"
            )
        made: dict[Prompt, RenderedPrompt] = {}
        rendered = []
        for number, prompt in enumerate(prompts):
            key = replace(prompt, seed=None)
            if key not in made:
                where = f"{prompt.where}: " if prompt.where else ""
                where = where or (f"prompt {number + 1} of {len(prompts)}: " if len(prompts) > 1 else "")
                try:
                    made[key] = self.render(prompt, v2pe_numerator)
                except DataError as error:
                    raise DataError(f"{where}{error}") from error
                self._check_length(made[key], max_new_tokens, where)
            rendered.append(made[key])
        return rendered

    def render(self, prompt: Prompt, v2pe_numerator: int) -> RenderedPrompt:
        """Template, tiling and positions of a prompt. Raises `DataError`."""
        said = [Turn(role, text) for turn in prompt.history for role, text in zip(("human", "gpt"), turn, strict=True)]
        turns = [*said, Turn("human", prompt.question)]
        if prompt.video is None:
            images = [self._plan_image(path, prompt) for path in prompt.images]
            block_tiles = [image.num_tiles for image in images]
        else:
            images = [_plan_video(prompt)]
            block_tiles = [1] * prompt.num_frames
            turns = place_frames(turns, prompt.num_frames)
        context_tokens = [tiles * self._config.model.vision.tokens_per_tile for tiles in block_tiles]
        system = self._config.data.system_prompt if prompt.system is None else prompt.system
        tokens = render_prompt(turns, context_tokens, self._tokenizer, system, prompt.answer_start)
        starts = tokens.image_starts.tolist()
        strides = [v2pe_numerator] * len(starts)
        places = [np.arange(start, start + count) for start, count in zip(starts, context_tokens, strict=True)]
        return RenderedPrompt(
            token_ids=tokens.token_ids,
            positions=v2pe_numerators(len(tokens.token_ids), starts, context_tokens, strides),
            images=tuple(images),
            image_places=np.concatenate([np.empty(0, dtype=np.int64), *places]),
        )

    def header_ids(self, prompt: Prompt) -> list[int]:
        """The last tokens of a prompt: what stands before the answer, and its given beginning."""
        return answer_header(self._tokenizer, prompt.answer_start)

    def _plan_image(self, path: str, prompt: Prompt) -> ImageRef:
        """How an image of a prompt is cut."""
        data = self._config.data
        max_tiles = prompt.max_tiles or max(1, data.max_tiles // len(prompt.images))
        size = image_size(path)
        grid = choose_grid(*size, data.min_tiles, max_tiles, self._config.model.vision.tile_pixels)
        return ImageRef(path, grid, num_tiles(grid, data.use_thumbnail), jpeg_seed=None, where=prompt.where)

    def _check_length(self, rendered: RenderedPrompt, max_new_tokens: int, where: str) -> None:
        needed = int(rendered.positions[-1]) // UNITS_PER_POSITION + 1 + max_new_tokens
        if needed > self._max_positions:
            raise ConfigError(
                f"{where}{len(rendered.token_ids)} tokens ({len(rendered.image_places)} of images) and an answer of "
                f"{max_new_tokens} take {needed} positions, and the context has {self._max_positions}; shorten one of them, "
                "cut images into fewer tiles (data.max_tiles), let image tokens take less (v2pe_numerator), or raise "
                "max_positions"
            )


def _plan_video(prompt: Prompt) -> ImageRef:
    """Which frames of a prompt's video are seen, a tile each."""
    assert prompt.video is not None, "the prompt has a video"
    if prompt.images:
        raise DataError(f"video {prompt.video}: a prompt has images or a video, not both; leave one of them out")
    if prompt.num_frames < 1:
        raise DataError(f"video {prompt.video}: num_frames must be at least 1, not {prompt.num_frames}")
    files: tuple[str, ...] = ()
    if is_folder(prompt.video):
        if prompt.clip is not None:
            raise DataError(
                f"video {prompt.video}: a folder of frames has no times, and takes no clip; name its frames as images"
            )
        files = choose_files(prompt.video, prompt.num_frames, None)
    else:
        check_video(prompt.video, prompt.clip, MAX_IMAGE_PIXELS)
    frames = VideoFrames(None, prompt.clip, files)
    return ImageRef(prompt.video, (1, 1), prompt.num_frames, None, where=prompt.where, video=frames)
