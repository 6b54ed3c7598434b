"""Questions asked many times: answers in a file that grows, survives a kill, and is the same however the work was divided.

A draw depends on the seed, the question's id and the number of the answer alone. Work is done in batches of questions at fixed
places of the file; a batch that was cut off is done again from its beginning.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl_megatron.checkpoint import folders
from internvl_megatron.data.conversation import IMAGE_PLACEHOLDER
from internvl_megatron.data.images import image_size
from internvl_megatron.data.json_object import parse_object
from internvl_megatron.data.jsonl_file import JsonlFile
from internvl_megatron.device import DeviceName
from internvl_megatron.errors import ConfigError, DataError
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.launcher import launch
from internvl_megatron.ranks import RankInfo

FILL_RANK = "tools.rollouts:fill_rank"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A line of a questions file: `{[id], [image], question, [answer], [response]}`."""

    where: str
    """`file:line`, for messages."""
    id: str
    """The line's number if the file has none."""
    image: str | list[str] | None
    """As it stands in the file."""
    paths: tuple[str, ...]
    """Of the images, from the working directory."""
    text: str
    truth: str | None
    """The known answer."""
    response: str | None
    """An answer in full that is taken for good where none can be checked."""

    @property
    def prompt(self) -> Prompt:
        """The question by itself."""
        return Prompt(self.text, self.paths)

    @property
    def text_without_images(self) -> str:
        """For asking without showing."""
        return self.text.replace(IMAGE_PLACEHOLDER, "").strip()


def read_questions(path: Path, root: Path) -> list[Question]:
    """Read and check a questions file; images are only looked at when their turn comes.

    Args:
        path: of the file.
        root: folder that names of images are relative to.

    Raises:
        DataError: at the first line that is wrong.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such questions file; check the path")
    file = JsonlFile(path)
    questions: dict[str, Question] = {}
    for index in range(len(file)):
        question = _parse(file.read(index), file.where(index), index, root)
        if question.id in questions:
            raise DataError(
                f"{question.where}: field 'id': {question.id!r} is taken by {questions[question.id].where}"
            )
        questions[question.id] = question
    return list(questions.values())


def _parse(raw: dict[str, Any], where: str, index: int, root: Path) -> Question:
    texts = {}
    for name in ("question", "answer", "response"):
        value = raw.get(name)
        if not (isinstance(value, str) and value.strip()) and (name == "question" or value is not None):
            raise DataError(f"{where}: field '{name}': must be a string that is not empty, not {str(value)[:80]!r}")
        texts[name] = value
    identity = raw.get("id", index + 1)
    if not isinstance(identity, str | int) or isinstance(identity, bool) or identity == "":
        raise DataError(f"{where}: field 'id': must be a string or a whole number, not {identity!r}")
    image = raw.get("image")
    names = [image] if isinstance(image, str) else image or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: field 'image': must be a path or a list of paths, not {image!r}")
    found = texts["question"].count(IMAGE_PLACEHOLDER)
    if found and found != len(names):
        raise DataError(
            f"{where}: field 'question': has {found} {IMAGE_PLACEHOLDER}, but field 'image' has {len(names)}; the two must be "
            "equal"
        )
    return Question(
        where=where,
        id=str(identity),
        image=image,
        paths=tuple(str(root / name) for name in names),
        text=texts["question"],
        truth=texts["answer"],
        response=texts["response"],
    )


@dataclass(frozen=True, slots=True)
class Job:
    """Prompts that belong together, each asked several times."""

    id: str
    where: str
    """For messages."""
    prompts: tuple[Prompt, ...]
    times: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """With what and how questions are asked."""

    weights: str
    """Folder of a run, of a checkpoint of it, or of converted weights."""
    temperature: float
    top_k: int
    top_p: float
    seed: int
    max_new_tokens: int
    batch_jobs: int
    """Jobs that are asked together."""
    num_ranks: int = 1
    """Local ranks; those beyond `tensor_size` x `pipeline_size` make replicas, which share a batch's prompts."""
    tensor_size: int = 1
    pipeline_size: int = 1
    max_sequences: int = 32
    """Answers that grow together, on each replica."""
    device: DeviceName = "auto"

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on."""
        names = ("weights", "temperature", "top_k", "top_p", "seed", "max_new_tokens", "batch_jobs")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Part:
    """Which of the questions are this process's, from the first to the last of their jobs."""

    number: int = 0
    count: int = 1

    def path(self, folder: Path, name: str) -> Path:
        """Of this part's journal."""
        return folder / f"{name}-{self.number}-of-{self.count}.jsonl"

    def of(self, questions: Sequence[Question]) -> Sequence[Question]:
        """Its questions."""
        return questions[self.number :: self.count]

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From `I/N`, I counted from 0.

        Raises:
            ConfigError: it is not.
        """
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise ConfigError(f"--part {text}: must be I/N with I from 0 to N - 1, as 0/8")
        return cls(int(number), int(count))


def ask(folder: Path, name: str, jobs: Sequence[Job], asking: Asking, part: Part) -> dict[str, list[str]]:
    """Answers of this part's jobs, by id: for each prompt in turn `times` answers. Those that are missing are made.

    Args:
        folder: where the journals are.
        name: of the journals.
        jobs: of this part, in the same order each time.
        asking: how.
        part: this process's.

    Raises:
        UserError: settings are not those the journal was begun with; weights, images or settings are wrong.
        RankFailedError: as `launch`.
    """
    if not jobs:
        return {}
    path = part.path(folder, name)
    asking = replace(asking, weights=_checkpoint(Path(asking.weights)))
    settings = {**asking.settings, "questions": _digest(jobs)}
    with open_journal(path, settings) as journal:
        done = set(journal.done)
    batches = [jobs[first : first + asking.batch_jobs] for first in range(0, len(jobs), asking.batch_jobs)]
    missing = [batch for batch in batches if not all(job.id in done for job in batch)]
    if missing:
        print(f"{path}: {len(done)} of {len(jobs)} done", flush=True)
        launch(FILL_RANK, asking.num_ranks, path, settings, missing, asking, device=asking.device)
    return read_answers(path)


def collect(folder: Path, name: str, jobs: Sequence[Job], num_parts: int) -> dict[str, list[str]] | None:
    """Answers of the jobs of all parts, by id; None while parts are not done."""
    found: dict[str, list[str]] = {}
    for number in range(num_parts):
        path = Part(number, num_parts).path(folder, name)
        if path.is_file():
            found |= read_answers(path, is_growing=True)
    return found if all(job.id in found for job in jobs) else None


def _checkpoint(weights: Path) -> str:
    """Of a run, the checkpoint that is its newest now."""
    finished = folders.finished(weights / folders.CHECKPOINTS)
    return str(finished[-1] if finished else weights)


def _digest(jobs: Sequence[Job]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for job in jobs:
        digest.update(repr((job.id, job.prompts, job.times)).encode(errors="surrogatepass"))
    return digest.hexdigest()


def fill_rank(
    info: RankInfo, path: Path, settings: dict[str, Any], batches: Sequence[Sequence[Job]], asking: Asking
) -> None:
    """Ask batches of jobs, of which a journal may have a part; the body of one rank. The first one writes.

    Raises:
        DataError: an image cannot be read; names the question.
    """
    from internvl_megatron.inference.run import Setup, open_generator
    from internvl_megatron.inference.settings import Limits, Sampling

    sampling = Sampling(asking.temperature, asking.top_k, asking.top_p, asking.seed)
    limits = Limits(max_sequences=asking.max_sequences)
    setup = Setup(asking.tensor_size, asking.pipeline_size, limits)
    with contextlib.ExitStack() as opened:
        journal = opened.enter_context(open_journal(path, settings)) if info.rank == 0 else None
        generator = opened.enter_context(open_generator(info, Path(asking.weights), asking.device, setup=setup))
        for number, batch in enumerate(batches, 1):
            _check_images(batch)
            prompts = [prompt for job in batch for prompt in seeded(job)]
            answers = iter(generator.answer(prompts, asking.max_new_tokens, sampling=sampling))
            if journal is None:
                continue
            for job in batch:
                own = [next(answers) for _ in range(len(job.prompts) * job.times)]
                if job.id not in journal.done:
                    journal.add(job.id, own)
            if number % max(1, len(batches) // 20) == 0:
                print(f"{path.name}: batch {number} of {len(batches)}", flush=True)


def seeded(job: Job) -> list[Prompt]:
    """All prompts of a job, each so often, with the seeds that its id gives them."""

    def seed(*place: int) -> int:
        return int.from_bytes(hashlib.blake2b(repr((job.id, *place)).encode(), digest_size=8).digest(), "big")

    return [
        replace(prompt, seed=seed(number, time))
        for number, prompt in enumerate(job.prompts)
        for time in range(job.times)
    ]


def _check_images(batch: Sequence[Job]) -> None:
    for job in batch:
        for path in {path for prompt in job.prompts for path in prompt.images}:
            try:
                image_size(path)
            except DataError as error:
                raise DataError(f"{job.where}: field 'image': {error}") from error


class Journal:
    """An open file of answers."""

    def __init__(self, descriptor: int, done: set[str]) -> None:
        """Go on at the end of a file; `done` are the ids in it."""
        self._descriptor = descriptor
        self.done = done

    def add(self, identity: str, answers: list[str]) -> None:
        """One line more, on disk before this returns."""
        _append(self._descriptor, {"id": identity, "answers": answers})
        self.done.add(identity)


@contextmanager
def open_journal(path: Path, settings: dict[str, Any]) -> Iterator[Journal]:
    """Go on with a file of answers, or begin it; a last line that was cut off is dropped.

    Raises:
        ConfigError: it was begun with other settings, or another process writes to it.
        DataError: it is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"{path}: another process writes to it; wait, or give each its own --part") from error
        content = path.read_bytes()
        os.ftruncate(descriptor, content.rfind(b"\n") + 1)
        if b"\n" not in content:
            _append(descriptor, {"settings": settings})
        begun = parse_object(path.read_bytes().partition(b"\n")[0], f"{path}:1", "each line").get("settings")
        if begun != settings:
            before = begun if isinstance(begun, dict) else {}
            changed = [
                f"{name} was {before.get(name)}, is {settings[name]}"
                for name in settings
                if before.get(name) != settings[name]
            ]
            raise ConfigError(
                f"{path}: was begun with other settings ({'; '.join(changed)}); set them back, or choose another folder"
            )
        yield Journal(descriptor, set(read_answers(path)))
    finally:
        os.close(descriptor)


def _append(descriptor: int, value: object) -> None:
    os.write(descriptor, json.dumps(value).encode() + b"\n")
    os.fsync(descriptor)


def read_answers(path: Path, is_growing: bool = False) -> dict[str, list[str]]:
    """Answers by the question's id, of a journal or of a file of such lines, `{id, answers: [...]}`.

    Args:
        path: of the file.
        is_growing: another process may be writing its last line, which is left out then.

    Raises:
        DataError: it is not there, or a line is wrong.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file of answers; check the path")
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1 if is_growing else len(content)].split(b"\n")
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        raw = parse_object(line, where, "each line")
        if number == 1 and "settings" in raw:
            continue
        identity, answers = raw.get("id"), raw.get("answers")
        if not isinstance(identity, str | int) or isinstance(identity, bool):
            raise DataError(f"{where}: field 'id': must be a string or a whole number, not {identity!r}")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{where}: field 'answers': must be a list of strings")
        if str(identity) in found:
            raise DataError(f"{where}: field 'id': {identity!r} is there twice")
        found[str(identity)] = answers
    return found
