"""Generation: prompts are divided over data-parallel replicas, which answer theirs at their own pace (`batch.py`)."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.positions import UNITS_PER_POSITION
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.device import Device
from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.answer_text import AnswerText
from internvl_megatron.inference.batch import Batch
from internvl_megatron.inference.pieces import embed, prompt_piece
from internvl_megatron.inference.prompt import ENDS, Answer, End, Prompt
from internvl_megatron.inference.requests import RenderedPrompt, Renderer, Request
from internvl_megatron.inference.settings import GREEDY, Generation, Limits, Sampling
from internvl_megatron.inference.stages import Stages
from internvl_megatron.model.build import Model
from internvl_megatron.parallel.groups import Groups
from internvl_megatron.parallel.host import gather_integers

type OnText = Callable[[int, str], None]
"""Is given the number of a prompt and the next piece of its answer."""


class Generator:
    """Answers prompts."""

    def __init__(
        self,
        config: RunConfig,
        model: Model,
        groups: Groups,
        tokenizer: Tokenizer,
        device: Device,
        limits: Limits | None = None,
    ) -> None:
        """Prepare to answer; all ranks do so together.

        Raises:
            ConfigError: the tokenizer has other tokens than the model.
        """
        vocab_size = config.model.language.vocab_size
        if len(tokenizer) > vocab_size:  # fewer may be: models have rows to spare
            raise ConfigError(
                f"data.tokenizer: {tokenizer.source} has {len(tokenizer)} tokens and the model {vocab_size}; use the "
                "tokenizer the model was trained with"
            )
        self.config = config
        self.model = model
        self.device = device
        self.tokenizer = tokenizer
        self.limits = limits or Limits()
        self.stages = Stages(config, model, groups, device)
        self.renderer = Renderer(config, tokenizer, self.limits.max_positions)
        self.groups = groups

    def answer(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 32,
        v2pe_numerator: int = UNITS_PER_POSITION,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Texts of the answers (`generate`), in the order of the prompts."""
        settings = Generation(
            max_new_tokens=max_new_tokens, v2pe_numerator=v2pe_numerator, sampling=sampling or GREEDY
        )
        return [answer.text for answer in self.generate(prompts, settings)]

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], settings: Generation | None = None, on_text: OnText | None = None
    ) -> list[Answer]:
        """Answer every prompt by itself; collective over all ranks.

        Args:
            prompts: any number, the same on every rank; their images are read when their turn comes, except for the headers.
            settings: how.
            on_text: told of answers as they grow, on one rank of each replica, which tells of the prompts that it answers.
                Pieces add up to the text of the answer.

        Returns:
            The answers in the order of the prompts, on every rank.

        Raises:
            DataError: an image cannot be read, or images and `<image>` differ in number.
            ConfigError: a setting is out of its range, or prompt and answer do not fit the context.
        """
        settings = settings or Generation()
        rendered = self.renderer.render_all(prompts, settings.v2pe_numerator, settings.max_new_tokens)
        tell = on_text if self.stages.leads else None
        batch, mine = self.new_batch(), []
        for number in self.own_numbers(len(prompts)):
            mine.append(self._request(number, prompts[number], rendered[number], settings, tell is not None))
            batch.add(mine[-1])
        while batch.is_busy:
            for request, piece in batch.step():
                if piece and tell is not None:
                    tell(request.number, piece)
        found = self.of_all_replicas({request.number: _message(request) for request in mine})
        return [
            self._finished(prompt, ids, ENDS[end], settings)
            for prompt, (end, *ids) in ((prompt, found[number]) for number, prompt in enumerate(prompts))
        ]

    @torch.no_grad()
    def stream(self, prompts: Iterable[Prompt], settings: Generation) -> Iterator[tuple[int, Answer]]:
        """Answer this replica's own prompts, each as soon as it is finished; collective over the ranks of a replica.

        Replicas may have different prompts and any number of them, and exchange nothing.

        Args:
            prompts: the same on every rank of the replica; one is taken when fewer than `limits.max_sequences` are under way, so
                that what its images need can be made then.
            settings: how.

        Yields:
            The number of a prompt, and its answer.

        Raises:
            DataError: an image cannot be read, or images and `<image>` differ in number.
            ConfigError: a setting is out of its range, or prompt and answer do not fit the context.
        """
        batch, coming = self.new_batch(), enumerate(prompts)
        asked: dict[int, Prompt] = {}
        while True:
            while len(asked) < self.limits.max_sequences and (taken := next(coming, None)) is not None:
                number, prompt = taken
                (rendered,) = self.renderer.render_all([prompt], settings.v2pe_numerator, settings.max_new_tokens)
                asked[number] = prompt
                batch.add(self._request(number, prompt, rendered, settings, has_text=False))
            if not batch.is_busy:
                return
            for request, _ in batch.step():
                if request.end is not None:
                    prompt = asked.pop(request.number)
                    yield request.number, self._finished(prompt, request.answer_ids, request.end, settings)

    def _request(
        self, number: int, prompt: Prompt, rendered: RenderedPrompt, settings: Generation, has_text: bool
    ) -> Request:
        """A prompt that is about to be asked; it makes text as it grows if it is to, or if its end may be in it."""
        text = self.text_of(prompt, settings) if has_text or settings.stop_strings else None
        return Request(number, rendered, settings, settings.sampling.seed_of(number, prompt.seed), text)

    @torch.no_grad()
    def logits(self, prompt: Prompt, num_positions: int) -> np.ndarray:
        """Scores of the next token after each of the last positions of a prompt, fp32 [positions, vocabulary].

        For comparing models, on one rank: ordinary positions (delta 1), the vocabulary without its padding.
        """
        request = Request(0, self.renderer.render(prompt, UNITS_PER_POSITION))
        end = len(request.rendered.token_ids)
        embed(self.stages, [request])
        logits = self.stages.scores([prompt_piece(request, None, np.arange(max(0, end - num_positions), end))])
        assert logits is not None, "the only rank is on the last stage"
        return logits[:, : self.config.model.language.vocab_size].float().cpu().numpy()

    def new_batch(self) -> Batch:
        """A batch that requests can join on this replica; there is one at a time."""
        return Batch(self.stages, self.limits, self.config.data.tokens_per_row, self.tokenizer.turn_end_id)

    def text_of(self, prompt: Prompt, settings: Generation) -> AnswerText:
        """An empty text for the answer to a prompt."""
        before = self.renderer.header_ids(prompt)
        return AnswerText(self.tokenizer, before, bool(prompt.answer_start), settings.stop_strings)

    def _finished(self, prompt: Prompt, token_ids: Sequence[int], end: End, settings: Generation) -> Answer:
        """An answer from its tokens."""
        text = self.text_of(prompt, settings)
        for token_id in token_ids[: len(token_ids) - self.is_end(token_ids[-1], settings)]:
            text.add(token_id)
        text.end()
        return Answer(text.text, tuple(token_ids), end)

    def is_end(self, token_id: int, settings: Generation) -> bool:
        """Whether a token ends an answer and is no part of it."""
        return token_id == self.tokenizer.turn_end_id or token_id in settings.stop_ids

    def own_numbers(self, count: int) -> range:
        """Which of the prompts of a call this replica is for."""
        layout = self.groups.layout
        return range(layout.replica(self.groups.rank), count, layout.data_size)

    def of_all_replicas(self, own: dict[int, list[int]]) -> dict[int, list[int]]:
        """What every replica has found for its prompts, by their numbers, on all ranks."""
        if self.groups.layout.data_size == 1:
            return own
        message = [value for number, values in own.items() for value in (number, len(values), *values)]
        found: dict[int, list[int]] = {}
        for gathered in gather_integers(np.array(message, dtype=np.int64), self.groups.host_data):
            place, numbers = 0, gathered.tolist()
            while place < len(numbers):
                number, length = numbers[place : place + 2]
                found[number] = numbers[place + 2 : place + 2 + length]
                place += 2 + length
        return found


def _message(request: Request) -> list[int]:
    """How a finished request ended, and its tokens, as numbers."""
    assert request.end is not None, f"request {request.number} has left the batch"
    return [ENDS.index(request.end), *request.answer_ids]
