"""Answer a benchmark's questions with a model, and score the answers. The body of one rank; all ranks call it together.

Rank 0 decides what is asked: which answers are there already, and the key of each question. Replicas then answer every n-th of the rest at
their own pace and write each answer when they have it; rank 0 reads all of them back and scores.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from internvl_megatron.checkpoint.weight_sums import weights_id
from internvl_megatron.config.models import INTERNVL3
from internvl_megatron.errors import DataError
from internvl_megatron.evaluate.answer_store import AnswerStore
from internvl_megatron.evaluate.benchmark_report import BenchmarkResult
from internvl_megatron.evaluate.benchmarks.benchmark import Answered, Benchmark, Item, Options
from internvl_megatron.evaluate.benchmarks.registry import chosen_options, find_benchmark
from internvl_megatron.evaluate.settings import EvaluationSettings
from internvl_megatron.evaluate.streamed_answers import streamed_answers
from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation
from internvl_megatron.parallel.host import broadcast_bytes, gather_integers

ANSWERS = "answers"
"""Folder of the answers in that of a benchmark's results."""


type Asked = tuple[Benchmark, Options, list[Item]]
"""A benchmark, its options, and all of its questions."""


def read_benchmarks(settings: EvaluationSettings) -> list[Asked]:
    """The questions of all benchmarks, before the first is asked.

    Raises:
        DataError: data are missing or wrong; names file, line and field.
    """
    chosen = [find_benchmark(name) for name in settings.benchmarks]
    options = [chosen_options(benchmark, settings.options) for benchmark in chosen]
    return [(one, own, _read_items(one, own, settings.data)) for one, own in zip(chosen, options, strict=True)]


def run_benchmarks(
    generator: Generator,
    settings: EvaluationSettings,
    asked: Sequence[Asked],
    model: str,
    on_answer: Callable[[], None] = lambda: None,
) -> list[BenchmarkResult]:
    """Evaluate a model, one benchmark after the other; collective over all ranks.

    Args:
        generator: around the model.
        settings: how.
        asked: on what (`read_benchmarks`).
        model: what results call it.
        on_answer: called behind every answer of this rank's replica.

    Returns:
        The results, on rank 0; nothing on the others.

    Raises:
        DataError: a picture cannot be decoded, or ranks read different data; names file and line.
        ConfigError: a setting is wrong, or the output cannot be written.
    """
    identity = _identity(generator)
    found = [_run(generator, settings, identity, on_answer, *one) for one in asked]
    size = next((size for size, sizes in INTERNVL3.items() if sizes == generator.config.model), None)
    return [replace(result, model=model, size=size) for result in found if result is not None]


def _read_items(benchmark: Benchmark, options: Options, data: Path) -> list[Item]:
    """The questions of one."""
    folder = data / benchmark.name
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; docs/evaluation.md says how to download {benchmark.title}")
    items = benchmark.read(folder, options)
    if not items:
        raise DataError(f"{folder}: has no questions of {benchmark.title}; download it again")
    seen: dict[str, str] = {}
    for item in items:
        if item.id in seen:
            raise DataError(
                f"{item.where}: the question {item.id!r} is at {seen[item.id]} too; download the file again"
            )
        seen[item.id] = item.where
    return items


def _identity(generator: Generator) -> dict[str, Any]:
    """What answers depend on beside the question; the same under every layout."""
    config = generator.config
    return {
        "weights": weights_id(generator.model, generator.groups, with_adapters=True),
        "model": asdict(config.model),
        "dtype": config.dtype,
        "system_prompt": config.data.system_prompt,
        "min_tiles": config.data.min_tiles,
        "use_thumbnail": config.data.use_thumbnail,
    }


def _run(
    generator: Generator,
    settings: EvaluationSettings,
    identity: dict[str, Any],
    on_answer: Callable[[], None],
    benchmark: Benchmark,
    options: Options,
    items: Sequence[Item],
) -> BenchmarkResult | None:
    """One benchmark."""
    longest = benchmark.max_new_tokens if settings.max_new_tokens is None else settings.max_new_tokens
    generation = Generation(longest, settings.v2pe_numerator)
    asked = items[: settings.limit]
    store = AnswerStore(settings.output / benchmark.name / ANSWERS)
    own_keys = [_key(identity, generation, benchmark, item) for item in asked]
    keys, missing = _agree(generator, store, benchmark, asked, own_keys)
    layout, host_world = generator.groups.layout, generator.groups.host_world
    replica = layout.replica(generator.groups.rank)
    own = missing[replica :: layout.data_size]
    with store.writer(replica) if generator.stages.leads else nullcontext() as writer:

        def prompt_of(place: int, folder: Path) -> Prompt:
            return _prompt(benchmark, asked[own[place]], folder)

        for place, answer in streamed_answers(generator, len(own), prompt_of, generation):
            if writer is not None:
                item = asked[own[place]]
                writer.add(keys[own[place]], id=item.id, question=item.question, answer=answer.text, end=answer.end)
            on_answer()
    gather_integers(np.empty(0, dtype=np.int64), host_world)  # everybody has written
    if generator.groups.rank != 0:
        return None
    answers = store.read()
    scores = benchmark.score([Answered(item, answers[key]) for item, key in zip(asked, keys, strict=True)], options)
    return BenchmarkResult(
        benchmark=benchmark.name,
        title=benchmark.title,
        weights=identity["weights"],
        options=dict(options),
        generation=asdict(generation),
        num_questions=len(asked),
        num_all_questions=len(items),
        scores=scores,
    )


def _key(identity: dict[str, Any], generation: Generation, benchmark: Benchmark, item: Item) -> str:
    """32 hex digits over all that an answer depends on."""
    video = None if item.video is None else [item.video.version, item.video.num_frames, item.video.seconds]
    pictures = [[picture.version, picture.enlargement] for picture in item.pictures]
    turns = [item.system, item.history, item.question, item.answer_start]
    asked = [identity, asdict(generation), benchmark.tiles_per_image(item), turns, pictures, video]
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=16).hexdigest()


def _agree(
    generator: Generator, store: AnswerStore, benchmark: Benchmark, asked: Sequence[Item], keys: list[str]
) -> tuple[list[str], list[int]]:
    """The keys of the questions and which of these are to be asked, as rank 0 finds them, on all ranks: those that have no answer
    yet, and of several with the same key the first.

    Raises:
        DataError: this rank reads other questions than rank 0.
    """
    texts = hashlib.blake2b(
        json.dumps([[item.id, item.question] for item in asked]).encode(), digest_size=16
    ).hexdigest()
    message = None
    if generator.groups.rank == 0:
        first_places = {key: number for number, key in reversed([*enumerate(keys)])}
        known = store.read()
        missing = [number for key, number in first_places.items() if key not in known]
        message = json.dumps([texts, keys, sorted(missing)]).encode()
    expected, keys, missing = json.loads(broadcast_bytes(message, 0, generator.groups.host_world))
    if texts != expected:
        raise DataError(
            f"{benchmark.name}: rank {generator.groups.rank} finds other questions than rank 0; give all machines the same files"
        )
    return keys, missing


def _prompt(benchmark: Benchmark, item: Item, folder: Path) -> Prompt:
    """An item as a prompt, its pictures in a folder."""
    images = [picture.as_file(folder, f"picture-{number}") for number, picture in enumerate(item.pictures, 1)]
    prompt = Prompt(
        item.question,
        tuple(images),
        item.system,
        item.history,
        item.answer_start,
        max_tiles=benchmark.tiles_per_image(item),
        where=item.where,
    )
    if item.video is None:
        return prompt
    return replace(prompt, video=item.video.path, num_frames=item.video.num_frames, clip=item.video.seconds)
