"""Generation on one rank: many prompts at once in one packed row, without a key-value cache.

Every round runs the language model over all unfinished sequences, each a segment of the row, and adds one token to each.
A finished sequence leaves the row and waiting prompts take its place, so memory is bounded by the row, whatever the
number of prompts. Prompts are encoded once, by the training pipeline's own template, tiling and positions.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.conversation import Turn, answer_header, answer_places, render_prompt
from internvl_megatron.data.images import ImageRef, decode_tiles, image_size
from internvl_megatron.data.positions import UNITS_PER_POSITION, v2pe_numerators
from internvl_megatron.data.tiling import choose_grid, num_tiles
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.device import Device
from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.sampling import GREEDY, Sampling, choose_tokens, draw
from internvl_megatron.model.attention import PackedRow
from internvl_megatron.model.build import Model
from internvl_megatron.model.language import ImageTokens
from internvl_megatron.model.rotary import rotary_tables


@dataclass
class _Sequence:
    """A prompt of n tokens and the answer so far."""

    prompt_ids: np.ndarray
    """int32 [n]."""
    prompt_positions: np.ndarray
    """int32 [n], in units of 1/256."""
    images: list[ImageRef]
    image_places: np.ndarray
    """int64 [i], places of the image tokens in the prompt, ascending."""
    seed: tuple[int, ...]
    """What its draws depend on, beside the step."""
    header_ids: list[int]
    """The end of the prompt: what stands before the answer, and its given beginning."""
    has_start: bool
    """Whether the answer's beginning is given."""
    embeddings: Tensor | None = None
    """[i, D] for the image tokens, while the sequence is in the row; None without images."""
    answer_ids: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> np.ndarray:
        """int64 [n + generated]."""
        return np.concatenate([self.prompt_ids, np.array(self.answer_ids, dtype=np.int64)])

    @property
    def positions(self) -> np.ndarray:
        """int32 [n + generated]: generated tokens go on from the prompt in whole positions (spec: V2PE generation)."""
        steps = np.arange(1, len(self.answer_ids) + 1, dtype=np.int32) * UNITS_PER_POSITION
        return np.concatenate([self.prompt_positions, self.prompt_positions[-1] + steps])


class Generator:
    """Answers prompts."""

    def __init__(self, config: RunConfig, model: Model, tokenizer: Tokenizer, device: Device) -> None:
        """Prepare to answer; `model` is whole on this rank (tensor and pipeline size 1)."""
        language, *more_chunks = model.language
        is_whole = (
            not more_chunks
            and language.pre_process
            and language.post_process
            and language.pg_collection.tp.size() == 1
        )
        assert is_whole, (
            "generation needs the whole language model on one rank; load it with tensor and pipeline size 1"
        )
        self.config = config
        self.vision = model.vision
        self.language = language
        self.tokenizer = tokenizer
        self.device = device

    @torch.no_grad()
    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 32,
        v2pe_numerator: int = UNITS_PER_POSITION,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Answer every prompt by itself.

        Args:
            prompts: any number; their images are read when their turn comes, except for the headers.
            max_new_tokens: an answer ends after so many tokens if `<|im_end|>` does not end it before.
            v2pe_numerator: position step of image tokens in units of 1/256; 256 gives ordinary positions.
            sampling: how tokens are chosen; None = the most likely one.

        Returns:
            The answers in the order of the prompts, without `<|im_end|>` and surrounding white space, and without
            `answer_start`; where that is given, white space stays at their front, since they go on behind it.

        Raises:
            DataError: an image cannot be read, or images and `<image>` differ in number.
            ConfigError: a number is out of its range.
        """
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: must be at least 1, not {max_new_tokens}")
        if not 1 <= v2pe_numerator <= UNITS_PER_POSITION:
            raise ConfigError(
                f"v2pe_numerator: must be 1 to {UNITS_PER_POSITION} (delta 1/256 to 1), not {v2pe_numerator}"
            )
        self.vision.eval()
        self.language.eval()
        sampling = sampling or GREEDY
        sequences = [
            self._render(prompt, v2pe_numerator, sampling.seed_of(number, prompt.seed))
            for number, prompt in enumerate(prompts)
        ]
        waiting, active = deque(sequences), list[_Sequence]()
        while waiting or active:
            active += self._admit(waiting, active, max_new_tokens)
            for sequence, token_id in zip(active, self._next_tokens(active, sampling), strict=True):
                sequence.answer_ids.append(token_id)
            active = self._unfinished(active, max_new_tokens)
        return [self._text(sequence) for sequence in sequences]

    @torch.no_grad()
    def logits(self, prompt: Prompt, num_positions: int) -> np.ndarray:
        """Scores of the next token after each of the last positions of a prompt, fp32 [positions, vocabulary].

        For comparing models: ordinary positions (delta 1), the vocabulary without its padding.
        """
        self.vision.eval()
        self.language.eval()
        sequence = self._render(prompt, UNITS_PER_POSITION, GREEDY.seed_of(0, None))
        if sequence.images:
            self._encode([sequence])
        end = len(sequence.prompt_ids)
        logits = self._row_logits([sequence], np.arange(max(0, end - num_positions), end))
        return logits[:, : self.config.model.language.vocab_size].float().cpu().numpy()

    @torch.no_grad()
    def answer_starts(self, prompts: Sequence[Prompt], token_ids: Sequence[int]) -> list[np.ndarray]:
        """Scores of some tokens as the first of every answer of a conversation, fp32 [answers, tokens] each.

        The answers are those of `history` and the one to come, in their order; each is scored behind the earlier ones as
        they stand there. Ordinary positions.
        """
        self.vision.eval()
        self.language.eval()
        waiting = deque(self._render(prompt, UNITS_PER_POSITION, GREEDY.seed_of(0, None)) for prompt in prompts)
        scores: list[np.ndarray] = []
        while waiting:
            row = self._admit(waiting, [], max_new_tokens=0)
            places = [answer_places(sequence.prompt_ids, self.tokenizer) for sequence in row]
            starts = np.cumsum([0] + [len(sequence.prompt_ids) for sequence in row])
            together = np.concatenate([own + start for own, start in zip(places, starts, strict=False)])
            logits = self._row_logits(row, together)[:, list(token_ids)].float().cpu().numpy()
            scores += np.split(logits, np.cumsum([len(own) for own in places])[:-1])
        return scores

    def _render(self, prompt: Prompt, v2pe_numerator: int, seed: tuple[int, ...]) -> _Sequence:
        """Template, tiling and positions of a prompt; of its images only the headers are read."""
        images = [self._plan_image(path, len(prompt.images)) for path in prompt.images]
        context_tokens = [image.num_tiles * self.config.model.vision.tokens_per_tile for image in images]
        system = self.config.data.system_prompt if prompt.system is None else prompt.system
        said = [Turn(role, text) for turn in prompt.history for role, text in zip(("human", "gpt"), turn, strict=True)]
        turns = [*said, Turn("human", prompt.question)]
        rendered = render_prompt(turns, context_tokens, self.tokenizer, system, prompt.answer_start)
        starts = rendered.image_starts.tolist()
        strides = [v2pe_numerator] * len(images)
        places = [np.arange(start, start + count) for start, count in zip(starts, context_tokens, strict=True)]
        return _Sequence(
            prompt_ids=rendered.token_ids,
            prompt_positions=v2pe_numerators(len(rendered.token_ids), starts, context_tokens, strides),
            images=images,
            image_places=np.concatenate([np.empty(0, dtype=np.int64), *places]),
            seed=seed,
            header_ids=answer_header(self.tokenizer, prompt.answer_start),
            has_start=bool(prompt.answer_start),
        )

    def _plan_image(self, path: str, num_images: int) -> ImageRef:
        """How an image is cut when `num_images` images share the tiles of a sample, as in training."""
        data = self.config.data
        max_tiles = max(1, data.max_tiles // num_images)
        grid = choose_grid(*image_size(path), data.min_tiles, max_tiles, self.config.model.vision.tile_pixels)
        return ImageRef(path, grid, num_tiles(grid, data.use_thumbnail), jpeg_seed=None)

    def _admit(self, waiting: deque[_Sequence], active: Sequence[_Sequence], max_new_tokens: int) -> list[_Sequence]:
        """Take waiting sequences that fit into the row even when all answers are as long as they may be."""
        used = sum(len(sequence.prompt_ids) + max_new_tokens for sequence in active)
        admitted: list[_Sequence] = []
        while waiting:
            used += len(waiting[0].prompt_ids) + max_new_tokens
            alone = not active and not admitted  # a prompt over the budget gets a row of its own
            if used > self.config.data.tokens_per_row and not alone:
                break
            admitted.append(waiting.popleft())
        self._encode([sequence for sequence in admitted if sequence.images])
        return admitted

    def _encode(self, sequences: Sequence[_Sequence]) -> None:
        """Embed the images of some sequences, all tiles together, chunk by chunk."""
        if not sequences:
            return
        vision, thumbnail = self.config.model.vision, self.config.data.use_thumbnail
        images = [image for sequence in sequences for image in sequence.images]
        tiles = np.concatenate([decode_tiles(image, vision.tile_pixels, thumbnail) for image in images])
        size = self.config.parallel.vision_chunk_tiles
        chunks = [self.device.put(tiles[first : first + size]) for first in range(0, len(tiles), size)]
        embeddings = torch.cat([self.vision(chunk) for chunk in chunks]).flatten(0, 1)
        parts = embeddings.split([len(sequence.image_places) for sequence in sequences])
        for sequence, part in zip(sequences, parts, strict=True):
            sequence.embeddings = part.clone()  # a view would keep all of the others in memory

    def _next_tokens(self, sequences: Sequence[_Sequence], sampling: Sampling) -> list[int]:
        """The next token of each sequence; padding of the vocabulary is at -inf and never is."""
        seen = [sequence.token_ids for sequence in sequences]
        last = np.cumsum([len(tokens) for tokens in seen]) - 1
        uniform = [draw(sequence.seed, len(sequence.answer_ids)) for sequence in sequences]
        return choose_tokens(self._row_logits(sequences, last), sampling, uniform, seen).tolist()

    def _row_logits(self, sequences: Sequence[_Sequence], places: np.ndarray) -> Tensor:
        """Logits [n, padded vocabulary] at n places of the row that the sequences make."""
        ends = np.cumsum([0] + [len(sequence.token_ids) for sequence in sequences])
        on_device = self.device.put(ends.astype(np.int32))
        language = self.config.model.language
        positions = self.device.put(np.concatenate([sequence.positions for sequence in sequences]))
        row = PackedRow(
            cu_seqlens_q=on_device,
            cu_seqlens_kv=on_device,
            segment_ends=tuple(ends.tolist()),
            rotary=rotary_tables(positions, language.head_size, language.rope_theta),
        )
        token_ids = self.device.put(np.concatenate([sequence.token_ids for sequence in sequences]))
        images = self._image_tokens(sequences, ends)
        return self.language(token_ids[None], row, images, self.device.put(places))[:, 0]

    def _image_tokens(self, sequences: Sequence[_Sequence], ends: np.ndarray) -> ImageTokens | None:
        """Image embeddings of a row and their places in it; sequence j starts at ends[j]."""
        embeddings = [sequence.embeddings for sequence in sequences if sequence.embeddings is not None]
        if not embeddings:
            return None
        places = [sequence.image_places + start for sequence, start in zip(sequences, ends, strict=False)]
        return ImageTokens(torch.cat(embeddings), self.device.put(np.concatenate(places)))

    def _unfinished(self, sequences: Sequence[_Sequence], max_new_tokens: int) -> list[_Sequence]:
        """Those that go on; the others give their embeddings back."""
        going_on = []
        for sequence in sequences:
            ended = sequence.answer_ids[-1] == self.tokenizer.turn_end_id
            if ended or len(sequence.answer_ids) >= max_new_tokens:
                sequence.embeddings = None
            else:
                going_on.append(sequence)
        return going_on

    def _text(self, sequence: _Sequence) -> str:
        """The answer's text. Special tokens stay: grounding text is made of them."""
        ids = (
            sequence.answer_ids[:-1] if sequence.answer_ids[-1] == self.tokenizer.turn_end_id else sequence.answer_ids
        )
        before = sequence.header_ids
        # Behind what it goes on from: a tokenizer may leave out white space at the front of a text.
        text = self.tokenizer.decode([*before, *ids])[len(self.tokenizer.decode(before)) :]
        return text.rstrip() if sequence.has_start else text.strip()
