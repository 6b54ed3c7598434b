"""Requests under way on one replica: they join at any time, grow by a token each at a time, and leave.

Requests wait in a queue. While there is room, those in front go through the model in one packed row and take a slot of the cache
each; then all sequences under way get their next token in one batch, whatever their lengths and settings. Who is finished
leaves, and its slot goes to the next one. Inside a replica every rank keeps the same books, and the last stage says which tokens
were chosen.
"""

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from internvl_megatron.inference.pieces import embed, newest_piece, prompt_piece
from internvl_megatron.inference.requests import Request
from internvl_megatron.inference.sampling import choose_tokens, draw
from internvl_megatron.inference.settings import Limits, Sampling
from internvl_megatron.inference.stages import Stages


class Batch:
    """All ranks of the replica call the same methods with the same arguments."""

    def __init__(self, stages: Stages, limits: Limits, tokens_per_row: int, turn_end_id: int) -> None:
        """Begin without requests.

        Args:
            stages: the replica's model and cache; nobody else uses them while requests are under way.
            limits: how much is under way at a time.
            tokens_per_row: prompts that are computed together have so many tokens at most; one that is longer is alone.
            turn_end_id: the token `<|im_end|>`.
        """
        self.waiting: deque[Request] = deque()
        self.active: list[Request] = []
        """The n-th has slot n."""
        self._stages = stages
        self._limits = limits
        self._tokens_per_row = tokens_per_row
        self._turn_end_id = turn_end_id

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.active)

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(request)

    def drop(self, requests: Collection[Request]) -> None:
        """Let requests go that nobody waits for any more, wherever they are; their slots are free."""
        self.waiting = deque(request for request in self.waiting if request not in requests)
        self._release(requests)

    @torch.no_grad()
    def step(self) -> list[tuple[Request, str]]:
        """Run the model once: on prompts, if some can join, else on the newest token of every sequence.

        Returns:
            The requests that have got a token, with the text that is certain by it and has not been returned before (none where
            the request makes no text). Those with an `end` have left.

        Raises:
            DataError: an image cannot be read.
        """
        requests = self._admit()
        tokens = self._first_tokens(requests) if requests else self._next_tokens()
        requests = requests or list(self.active)
        grown = [(request, self._grow(request, token)) for request, token in zip(requests, tokens, strict=True)]
        self._release([request for request in requests if request.end is not None])
        return grown

    def _admit(self) -> list[Request]:
        """Take requests from the front that fit even when all answers are as long as they may be."""
        limits, cache = self._limits, self._stages.cache
        longest = max((request.most_tokens for request in self.active), default=0)
        admitted: list[Request] = []
        rendered: set[int] = set()
        row_tokens = 0
        while self.waiting:
            request = self.waiting[0]
            num_sequences = len(self.active) + len(admitted) + 1
            longest_then = max(longest, request.most_tokens)
            is_new = id(request.rendered) not in rendered
            row_tokens += len(request.rendered.token_ids) * is_new
            fits = (
                num_sequences <= limits.max_sequences
                and num_sequences * longest_then <= limits.cache_tokens
                and row_tokens <= self._tokens_per_row
            )
            # One that fits nowhere is alone; one that is longer than rows is so in its row.
            if not fits and num_sequences > 1:
                break
            longest = longest_then
            rendered.add(id(request.rendered))
            admitted.append(self.waiting.popleft())
        if admitted:
            num_slots = len(self.active) + len(admitted)
            # Room that is there already is kept as long as it is not too much: making other room copies everything.
            roomy = max(num_slots, cache.num_slots), max(longest, cache.slot_tokens)
            cache.reserve(*(roomy if roomy[0] * roomy[1] <= limits.cache_tokens else (num_slots, longest)))
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
        embed(self._stages, leading)
        last = [np.array([len(request.rendered.token_ids) - 1]) for request in leading]
        pieces = [prompt_piece(*place) for place in zip(leading, slots, last, strict=True)]
        logits = self._stages.scores(pieces)
        for request in leading:
            request.embeddings = None
        rows = [leaders[id(request.rendered)] for request in admitted]
        for slot, (row, request) in enumerate(zip(rows, admitted, strict=True), first_slot):
            if slots[row] != slot:
                self._stages.cache.copy(slots[row], slot, len(request.rendered.token_ids))
        self.active += admitted
        return self._choose(admitted, None if logits is None else logits[rows])

    def _next_tokens(self) -> list[int]:
        """Run the newest token of every sequence through the model, and choose the next ones."""
        pieces = [newest_piece(request, slot) for slot, request in enumerate(self.active)]
        return self._choose(self.active, self._stages.scores(pieces))

    def _choose(self, requests: Sequence[Request], logits: Tensor | None) -> list[int]:
        """Next tokens, chosen on the last stage, together for those who are sampled alike."""
        chosen = None
        if logits is not None:
            alike: dict[Sampling, list[int]] = {}
            for place, request in enumerate(requests):
                alike.setdefault(replace(request.settings.sampling, seed=0), []).append(place)
            tokens = torch.cat([_choose_alike(requests, logits, *group) for group in alike.items()])
            places = [place for group in alike.values() for place in group]
            chosen = [token for _, token in sorted(zip(places, tokens.tolist(), strict=True))]
        return self._stages.agree(chosen, len(requests))

    def _grow(self, request: Request, token_id: int) -> str:
        """Give a request its token, and notice whether it ends; what is new of its text."""
        settings, text = request.settings, request.text
        request.answer_ids.append(token_id)
        piece = ""
        if token_id == self._turn_end_id:
            request.end = "turn_end"
        elif token_id in settings.stop_ids:
            request.end = "stop"
        elif text is not None:
            piece = text.add(token_id)
        if request.end is None and text is not None and text.is_stopped:
            request.end = "stop"
        elif request.end is None and len(request.answer_ids) == settings.max_new_tokens:
            request.end = "length"
        return piece if text is None or request.end is None else piece + text.end()

    def _release(self, gone: Collection[Request]) -> None:
        """Let sequences go; the last ones take over their slots."""
        slot = 0
        while slot < len(self.active):
            request = self.active[slot]
            if request not in gone:
                slot += 1
                continue
            last = self.active.pop()
            if last is not request:
                if last not in gone:
                    self._stages.cache.copy(len(self.active), slot, last.num_cached)
                self.active[slot] = last


def _choose_alike(requests: Sequence[Request], logits: Tensor, sampling: Sampling, places: Sequence[int]) -> Tensor:
    """Next tokens of the requests at some places, int64 [places]; they are sampled alike but for their seeds."""
    own = [requests[place] for place in places]
    uniform = [] if sampling.is_greedy else [draw(request.seed, len(request.answer_ids)) for request in own]
    seen = [] if sampling.repetition_penalty == 1 else [request.token_ids for request in own]
    rows = logits if len(own) == len(requests) else logits[list(places)]
    return choose_tokens(rows, sampling, uniform, seen)
