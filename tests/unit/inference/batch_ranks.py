"""Body of the test rank: requests with settings of their own join a batch while others are under way, and some are dropped."""

from dataclasses import dataclass, field

from internvl_megatron.inference.prompt import Answer, Prompt
from internvl_megatron.inference.settings import Generation, Limits
from internvl_megatron.ranks import RankInfo
from tests.unit.inference.generation_ranks import small_generator

type Asked = tuple[Prompt, Generation]


@dataclass
class Joined:
    """What a batch did."""

    alone: list[Answer]
    """What `generate` answers to each prompt by itself."""
    ids: list[tuple[int, ...]]
    ends: list[str | None]
    texts: list[str]
    """Pieces that `step` has returned, joined."""
    sizes: list[int] = field(default_factory=list)
    """Sequences under way after every step."""
    rooms: list[tuple[int, int]] = field(default_factory=list)
    """Slots of the cache after every step, and tokens of each."""


def join(
    info: RankInfo, tensor: int, pipeline: int, asked: list[Asked], limits: Limits, every: int, drops: dict[int, int]
) -> Joined:
    """One request joins at every `every`-th step; number n is dropped when it has drops[n] tokens (0 = while it waits)."""
    from internvl_megatron.inference.requests import Request

    with small_generator(info, "300m", tensor, pipeline, limits, end_scale=0.1) as small:
        generator = small.generator
        alone = [generator.generate([prompt], settings)[0] for prompt, settings in asked]
        requests = [
            Request(
                number,
                generator.renderer.render(prompt, settings.v2pe_numerator),
                settings,
                settings.sampling.seed_of(0, prompt.seed),
                generator.text_of(prompt, settings),
            )
            for number, (prompt, settings) in enumerate(asked)
        ]
        texts = [""] * len(requests)
        batch, waiting, count = generator.new_batch(), list(requests), 0
        found = Joined(alone, [], [], texts)
        while waiting or batch.is_busy:
            if waiting and (count % every == 0 or not batch.is_busy):
                batch.add(waiting[0])
                if drops.get(waiting.pop(0).number) == 0:
                    batch.drop([batch.waiting[-1]])
            if batch.is_busy:
                for request, piece in batch.step():
                    texts[request.number] += piece
            gone = [one for one in batch.active if len(one.answer_ids) == drops.get(one.number)]
            batch.drop(gone)
            found.sizes.append(len(batch.active))
            found.rooms.append((generator.stages.cache.num_slots, generator.stages.cache.slot_tokens))
            count += 1
        found.ids = [tuple(request.answer_ids) for request in requests]
        found.ends = [request.end for request in requests]
    return found
