"""A request on its way through the server: what it asks of the model, and what comes back."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import End, Prompt
from internvl_megatron.inference.requests import RenderedPrompt, Request
from internvl_megatron.inference.settings import Generation, Sampling


@dataclass(frozen=True)
class Grown:
    """An answer has got a token."""

    index: int
    """Of the answer among those of the job."""
    text: str
    """What is new of it; may be empty."""
    num_tokens: int
    """It has by now."""
    end: End | None
    """How it ended; None = it goes on."""


type Tell = Callable[[Grown | None], object]
"""Is given what happens to a job, in the thread of the model; None = the server stops before it is answered."""


@dataclass(eq=False)
class Job:
    """One prompt, answered once or several times."""

    number: int
    prompt: Prompt
    settings: Generation
    """With the seed of all its draws."""
    num_answers: int
    rendered: RenderedPrompt
    tell: Tell
    requests: list[Request] = field(default_factory=list)
    """One for each answer, once it has joined."""

    def message(self) -> dict[str, Any]:
        """What other ranks need to know of it, as JSON can hold it."""
        return {
            "number": self.number,
            "prompt": asdict(self.prompt),
            "settings": asdict(self.settings),
            "num_answers": self.num_answers,
        }


def job_from_message(message: dict[str, Any], generator: Generator) -> Job:
    """The job on a rank that tells nobody of it."""
    fields = message["prompt"]
    prompt = Prompt(
        **{**fields, "images": tuple(fields["images"]), "history": tuple(tuple(turn) for turn in fields["history"])}
    )
    fields = message["settings"]
    stops = {name: tuple(fields[name]) for name in ("stop_strings", "stop_ids")}
    settings = replace(Generation(**{**fields, **stops}), sampling=Sampling(**fields["sampling"]))
    rendered = generator.renderer.render(prompt, settings.v2pe_numerator)
    return Job(message["number"], prompt, settings, message["num_answers"], rendered, lambda _: None)


def start(job: Job, generator: Generator) -> list[Request]:
    """Requests for its answers. The n-th draws as the n-th of equal prompts of one call of `generate`."""
    job.requests = [
        Request(
            job.number,
            job.rendered,
            job.settings,
            job.settings.sampling.seed_of(index, job.prompt.seed),
            generator.text_of(job.prompt, job.settings),
        )
        for index in range(job.num_answers)
    ]
    return job.requests


@dataclass(frozen=True)
class Orders:
    """What all ranks of the replica do before the next step."""

    joining: list[Job]
    leaving: list[int]
    """Numbers of jobs that nobody waits for any more."""
    is_last: bool
    """There is no next step."""

    def payload(self) -> bytes:
        """For other ranks."""
        jobs = [job.message() for job in self.joining]
        return json.dumps({"joining": jobs, "leaving": self.leaving, "is_last": self.is_last}).encode()


def orders_from_payload(payload: bytes, generator: Generator) -> Orders:
    """What the leading rank has ordered."""
    message = json.loads(payload)
    jobs = [job_from_message(one, generator) for one in message["joining"]]
    return Orders(jobs, message["leaving"], message["is_last"])
