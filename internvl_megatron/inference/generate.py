"""Generation: many answers grow together, one token each at a time, from cached keys and values.

Prompts wait in a queue. While there is room, those in front go through the model in one packed row and take a slot of the cache
each; then all sequences under way get their next token in one batch, whatever their lengths. Who is finished leaves, and its
slot goes to the next one. Prompts are divided over data-parallel replicas, which work at their own pace; inside a replica every
rank keeps the same books, and the last stage says which tokens were chosen.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.config.schema import RunConfig
from internvl_megatron.data.positions import UNITS_PER_POSITION
from internvl_megatron.data.tokenizer import Tokenizer
from internvl_megatron.device import Device
from internvl_megatron.errors import ConfigError
from internvl_megatron.inference.answer_text import AnswerText
from internvl_megatron.inference.prompt import ENDS, Answer, End, Prompt
from internvl_megatron.inference.requests import Renderer, Request
from internvl_megatron.inference.sampling import choose_tokens, draw
from internvl_megatron.inference.settings import GREEDY, Generation, Limits, Sampling
from internvl_megatron.inference.stages import Piece, Stages
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
        self._groups = groups

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
        mine = [
            Request(number, prompts[number], rendered[number], settings.sampling.seed_of(number, prompts[number].seed))
            for number in self.own_numbers(len(prompts))
        ]
        done = _Run(self, settings, on_text if self.stages.leads else None).finish(mine)
        found = self.of_all_replicas({number: [ENDS.index(end), *ids] for number, (ids, end) in done.items()})
        return [
            self._finished(prompt, ids, ENDS[end], settings)
            for prompt, (end, *ids) in ((prompt, found[number]) for number, prompt in enumerate(prompts))
        ]

    @torch.no_grad()
    def logits(self, prompt: Prompt, num_positions: int) -> np.ndarray:
        """Scores of the next token after each of the last positions of a prompt, fp32 [positions, vocabulary].

        For comparing models, on one rank: ordinary positions (delta 1), the vocabulary without its padding.
        """
        request = Request(0, prompt, self.renderer.render(prompt, UNITS_PER_POSITION), ())
        end = len(request.rendered.token_ids)
        self.embed([request])
        logits = self.stages.scores([prompt_piece(request, None, np.arange(max(0, end - num_positions), end))])
        assert logits is not None, "the only rank is on the last stage"
        return logits[:, : self.config.model.language.vocab_size].float().cpu().numpy()

    def embed(self, requests: Sequence[Request]) -> None:
        """Encode the images of some requests, all tiles together."""
        with_images = [request for request in requests if request.rendered.images]
        if not with_images:
            return
        embeddings = iter(self.stages.encode([image for one in with_images for image in one.rendered.images]))
        for request in with_images:
            request.embeddings = torch.cat([next(embeddings) for _ in request.rendered.images])

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
        layout = self._groups.layout
        return range(layout.replica(self._groups.rank), count, layout.data_size)

    def of_all_replicas(self, own: dict[int, list[int]]) -> dict[int, list[int]]:
        """What every replica has found for its prompts, by their numbers, on all ranks."""
        if self._groups.layout.data_size == 1:
            return own
        message = [value for number, values in own.items() for value in (number, len(values), *values)]
        found: dict[int, list[int]] = {}
        for gathered in gather_integers(np.array(message, dtype=np.int64), self._groups.host_data):
            place, numbers = 0, gathered.tolist()
            while place < len(numbers):
                number, length = numbers[place : place + 2]
                found[number] = numbers[place + 2 : place + 2 + length]
                place += 2 + length
        return found


def prompt_piece(request: Request, slot: int | None, wanted: np.ndarray) -> Piece:
    """A whole prompt."""
    rendered = request.rendered
    return Piece(
        slot,
        0,
        rendered.token_ids,
        rendered.positions,
        wanted,
        rendered.image_places if rendered.images else None,
        request.embeddings,
    )


class _Run:
    """One call of `generate` on one replica."""

    def __init__(self, generator: Generator, settings: Generation, on_text: OnText | None) -> None:
        self.generator = generator
        self.stages = generator.stages
        self.limits = generator.limits
        self.settings = settings
        self.on_text = on_text
        self.active: list[Request] = []
        """The n-th has slot n."""
        self.texts: dict[int, AnswerText] = {}
        """Of the requests under way, where somebody waits for text or it may hold the end."""
        self.done: dict[int, tuple[list[int], End]] = {}

    def finish(self, requests: Sequence[Request]) -> dict[int, tuple[list[int], End]]:
        """Tokens of the answers and how they ended, by the numbers of the requests."""
        waiting = deque(requests)
        while waiting or self.active:
            admitted = self._admit(waiting)
            if admitted:
                self._append(admitted, self._first_tokens(admitted))
            else:
                self._append(self.active, self._next_tokens())
            self._release()
        return self.done

    def _admit(self, waiting: deque[Request]) -> list[Request]:
        """Take requests from the front that fit even when all answers are as long as they may be."""
        limits, cache = self.limits, self.stages.cache
        longest = cache.slot_tokens if self.active else 0
        admitted: list[Request] = []
        rendered: set[int] = set()
        row_tokens = 0
        while waiting:
            request = waiting[0]
            num_sequences = len(self.active) + len(admitted) + 1
            longest_then = max(longest, len(request.rendered.token_ids) + self.settings.max_new_tokens)
            is_new = id(request.rendered) not in rendered
            row_tokens += len(request.rendered.token_ids) * is_new
            fits = (
                num_sequences <= limits.max_sequences
                and num_sequences * longest_then <= limits.cache_tokens
                and row_tokens <= self.generator.config.data.tokens_per_row
            )
            if not fits and num_sequences > 1:  # one that fits nowhere is alone
                break
            longest = longest_then
            rendered.add(id(request.rendered))
            admitted.append(waiting.popleft())
        if admitted:
            num_slots = len(self.active) + len(admitted)
            cache.reserve(max(num_slots, cache.num_slots if self.active else 0), longest)
        return admitted

    def _first_tokens(self, admitted: Sequence[Request]) -> list[int]:
        """Run prompts through the model, each once however many answers are wanted, and choose first tokens."""
        first_slot = len(self.active)
        leaders: dict[int, int] = {}  # a prompt's place in the row, by its identity
        slots: list[int] = []
        for slot, request in enumerate(admitted, first_slot):
            if id(request.rendered) not in leaders:
                leaders[id(request.rendered)] = len(slots)
                slots.append(slot)
        leading = [admitted[slot - first_slot] for slot in slots]
        self.generator.embed(leading)
        last = [np.array([len(request.rendered.token_ids) - 1]) for request in leading]
        pieces = [prompt_piece(*place) for place in zip(leading, slots, last, strict=True)]
        logits = self.stages.scores(pieces)
        for request in leading:
            request.embeddings = None
        rows = [leaders[id(request.rendered)] for request in admitted]
        for slot, (row, request) in enumerate(zip(rows, admitted, strict=True), first_slot):
            if slots[row] != slot:
                self.stages.cache.copy(slots[row], slot, len(request.rendered.token_ids))
        self.active += admitted
        return self._choose(admitted, None if logits is None else logits[rows])

    def _next_tokens(self) -> list[int]:
        """Run the newest token of every sequence through the model, and choose the next ones."""
        newest = np.zeros(1, dtype=np.int64)
        pieces = [
            Piece(
                slot,
                request.num_cached,
                np.array(request.answer_ids[-1:]),
                request.rendered.next_positions(len(request.answer_ids) - 1, 1),
                newest,
            )
            for slot, request in enumerate(self.active)
        ]
        return self._choose(self.active, self.stages.scores(pieces))

    def _choose(self, requests: Sequence[Request], logits: Tensor | None) -> list[int]:
        """Next tokens, chosen on the last stage."""
        chosen = None
        if logits is not None:
            sampling = self.settings.sampling
            uniform = [] if sampling.is_greedy else [draw(one.seed, len(one.answer_ids)) for one in requests]
            seen = [] if sampling.repetition_penalty == 1 else [one.token_ids for one in requests]
            chosen = choose_tokens(logits, sampling, uniform, seen).tolist()
        return self.stages.agree(chosen, len(requests))

    def _append(self, requests: Sequence[Request], token_ids: Sequence[int]) -> None:
        """Give requests their tokens, and take notice of those that are finished with them."""
        for request, token_id in zip(requests, token_ids, strict=True):
            request.answer_ids.append(token_id)
            is_end = self.generator.is_end(token_id, self.settings)
            text = self._text_of(request)
            if text is not None and not is_end:
                self._tell(request, text.add(token_id))
            end: End | None = None
            if is_end:
                end = "turn_end" if token_id == self.generator.tokenizer.turn_end_id else "stop"
            elif text is not None and text.is_stopped:
                end = "stop"
            elif len(request.answer_ids) == self.settings.max_new_tokens:
                end = "length"
            if end is not None:
                self.done[request.number] = (request.answer_ids, end)
                if text is not None:
                    self._tell(request, text.end())

    def _text_of(self, request: Request) -> AnswerText | None:
        """Text of a request under way; None where nobody needs it yet."""
        if self.on_text is None and not self.settings.stop_strings:
            return None
        if request.number not in self.texts:
            self.texts[request.number] = self.generator.text_of(request.prompt, self.settings)
        return self.texts[request.number]

    def _tell(self, request: Request, piece: str) -> None:
        if self.on_text is not None and piece:
            self.on_text(request.number, piece)

    def _release(self) -> None:
        """Let finished sequences go; the last ones take over their slots."""
        slot = 0
        while slot < len(self.active):
            request = self.active[slot]
            if request.number not in self.done:
                slot += 1
                continue
            self.texts.pop(request.number, None)
            last = self.active.pop()
            if last is not request:
                if last.number not in self.done:
                    self.stages.cache.copy(len(self.active), slot, last.num_cached)
                self.active[slot] = last
