"""The commands that use a trained model: `generate`, `score`, `best-of-n` and `evaluate`."""

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from internvl_megatron.data.jsonl_file import JsonlFile
from internvl_megatron.device import DeviceName
from internvl_megatron.errors import ConfigError, DataError, UserError
from internvl_megatron.evaluate.benchmarks.registry import BENCHMARKS
from internvl_megatron.evaluate.settings import EvaluationSettings
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import DRAWN, GREEDY, Generation, Limits, Sampling, Setup

GENERATE = "internvl_megatron.inference.run:generate_rank"
SCORE = "internvl_megatron.inference.run:score_rank"
BEST_OF_N = "internvl_megatron.evaluate.run:best_of_n_rank"
EVALUATE = "internvl_megatron.evaluate.run:benchmark_rank"
MODEL = "folder of a run (its newest checkpoint), of one of its checkpoints, of converted weights, or a Hugging Face checkpoint"


def add_commands(commands: Any) -> None:
    """Add them to the subparsers of the command line."""
    generate = commands.add_parser(
        "generate", help="answer questions with a run, converted weights or a Hugging Face checkpoint"
    )
    add_model(generate)
    _add_question(generate)
    generate.add_argument(
        "--prompts",
        type=Path,
        help="in place of a question: a jsonl file with {question, [image], [video], [system]} a line; answers are written "
        "as jsonl",
    )
    _add_generation(generate, GREEDY)
    generate.add_argument("--stream", action="store_true", help="show the answer as it grows")
    generate.set_defaults(run=_generate)

    score = commands.add_parser("score", help="log-probabilities of given answers")
    add_model(score)
    _add_question(score)
    score.add_argument("--answer", action="append", default=[], required=True, help="may be given several times")
    score.add_argument("--with-end", action="store_true", help="count the end of the turn behind each answer too")
    score.add_argument("--tokens", action="store_true", help="show every token's log-probability")
    add_stride(score)
    score.set_defaults(run=_score)

    best = commands.add_parser("best-of-n", help="draw several answers and let a process reward model choose")
    add_model(best)
    best.add_argument("critic", type=Path, help="the process reward model, like the model")
    _add_question(best)
    best.add_argument("-n", "--num-answers", type=int, default=8, help="answers to each question (default: 8)")
    best.add_argument("--questions", type=Path, help="in place of a question: a questions file with known answers")
    best.add_argument("--output", type=Path, help="with --questions: folder of the report of score against N")
    best.add_argument("--instruction", type=Path, help="file with the system turn that the critic was trained with")
    _add_generation(best, DRAWN)
    best.set_defaults(run=_best_of_n)

    evaluate = commands.add_parser("evaluate", help="score a model on public benchmarks; run it again to continue")
    evaluate.add_argument("--checkpoint", dest="model", type=Path, required=True, help=MODEL)
    evaluate.add_argument("--benchmark", nargs="+", required=True, metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    evaluate.add_argument(
        "--data", type=Path, required=True, help="folder with a folder of each benchmark's name (docs/evaluation.md)"
    )
    evaluate.add_argument("--output", type=Path, required=True, help="folder of answers and results")
    evaluate.add_argument(
        "--option", action="append", default=[], metavar="BENCHMARK.OPTION=VALUE", help="a named option of a benchmark"
    )
    evaluate.add_argument("--limit", type=int, help="ask the first so many questions of each alone")
    evaluate.add_argument("--max-new-tokens", type=int, help="longest answer (default: each benchmark's own)")
    add_stride(evaluate)
    _add_ranks(evaluate)
    evaluate.set_defaults(run=_evaluate)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Arguments for the model and its ranks."""
    parser.add_argument("model", type=Path, help=MODEL)
    _add_ranks(parser)


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=get_args(DeviceName), default="auto")
    parser.add_argument("--nproc", type=int, help="ranks to start (default: those of one replica)")
    parser.add_argument("--tensor-size", type=int, default=1, help="tensor-parallel ranks of a replica")
    parser.add_argument("--pipeline-size", type=int, default=1, help="pipeline stages of a replica")
    limits = Limits()
    parser.add_argument("--max-sequences", type=int, default=limits.max_sequences, help="answers that grow together")
    parser.add_argument("--cache-tokens", type=int, default=limits.cache_tokens, help="tokens kept for them")
    parser.add_argument("--max-positions", type=int, default=limits.max_positions, help="the context")


def _add_question(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="?", help="the question; <image> marks where an image goes")
    parser.add_argument("--image", action="append", default=[], help="an image file; may be given several times")
    parser.add_argument("--video", help="a video file, or a folder of frames")
    parser.add_argument("--frames", type=int, default=16, help="frames of the video (default: 16)")
    parser.add_argument("--system", help="system turn; '' = none (default: the run's)")
    parser.add_argument("--answer-start", default="", help="text the answer begins with")


def add_stride(parser: argparse.ArgumentParser) -> None:
    """The argument for positions of image tokens."""
    parser.add_argument(
        "--v2pe-numerator", type=int, default=256, help="position step of image tokens / 256 (default: 256, delta 1)"
    )


def _add_generation(parser: argparse.ArgumentParser, sampling: Sampling) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=64)
    add_stride(parser)
    parser.add_argument("--temperature", type=float, default=sampling.temperature, help="0 = the most likely token")
    parser.add_argument("--top-k", type=int, default=sampling.top_k, help="0 = all tokens")
    parser.add_argument("--top-p", type=float, default=sampling.top_p)
    parser.add_argument("--seed", type=int, default=sampling.seed)
    parser.add_argument("--repetition-penalty", type=float, default=sampling.repetition_penalty, help="1 = off")
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends an answer; may be given several times"
    )
    parser.add_argument("--stop-id", action="append", type=int, default=[], help="token that ends an answer")


def _generate(options: argparse.Namespace) -> int:
    import json

    prompts = _prompts(options, options.prompts, "--prompts")
    is_streamed = options.stream and options.prompts is None
    answers = _launch(GENERATE, options, prompts, _generation(options), is_streamed=is_streamed)
    if options.prompts is not None:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(json.dumps({"question": prompt.question, "answer": answer}, ensure_ascii=False))
    else:
        print("" if is_streamed else answers[0])
    return 0


def _score(options: argparse.Namespace) -> int:
    prompts = _prompts(options, None, "")
    arguments = (options.answer, options.v2pe_numerator, options.with_end)
    scores = _launch(SCORE, options, prompts, *arguments)
    for answer, (total, tokens) in zip(options.answer, scores, strict=True):
        print(f"{total:12.4f}  {answer}")
        if options.tokens:
            for text, logprob in tokens:
                print(f"{logprob:12.4f}    {text!r}")
    return 0


def _best_of_n(options: argparse.Namespace) -> int:
    if (options.questions is None) != (options.output is None):
        raise UserError("--questions and --output go together: the report of a questions file needs a folder")
    if options.questions is None:
        prompts = _prompts(options, None, "")
    else:
        from internvl_megatron.evaluate.best_of_n_report import check_can_plot
        from internvl_megatron.evaluate.questions import read_questions

        _refuse_question(options, "--questions")
        check_can_plot()
        prompts = [Prompt(asked.question, asked.paths) for asked in read_questions(options.questions)]
    extra = {} if options.instruction is None else {"instruction": _read_text(options.instruction)}
    models = (options.model, options.critic)
    found = _launch(BEST_OF_N, options, prompts, options.num_answers, _generation(options), models=models, **extra)
    if options.questions is not None:
        from internvl_megatron.evaluate.best_of_n_report import report_best_of_n

        print(report_best_of_n(options.questions, options.output, found))
        return 0
    from internvl_megatron.inference.choosing import best

    answers, scores = found[0]
    for answer, score in zip(answers, scores, strict=True):
        print(f"{score:.4f}  {answer!r}", file=sys.stderr)
    print(answers[best(scores)])
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    settings = EvaluationSettings(
        benchmarks=tuple(options.benchmark),
        data=options.data,
        output=options.output,
        options=tuple(options.option),
        limit=options.limit,
        max_new_tokens=options.max_new_tokens,
        v2pe_numerator=options.v2pe_numerator,
    )
    print(_launch(EVALUATE, options, settings))
    return 0


def _launch(target: str, options: argparse.Namespace, asked: Any, *arguments: Any, **named: Any) -> Any:
    """Run the body of the ranks on what is asked; what the first one returns."""
    from internvl_megatron.launcher import launch

    replica = options.tensor_size * options.pipeline_size
    num_ranks = replica if options.nproc is None else options.nproc
    if num_ranks < 1:
        raise UserError(f"{num_ranks} ranks: start at least one (--nproc, --tensor-size, --pipeline-size)")
    models = named.pop("models", options.model)
    every = (models, asked, *arguments, options.device, setup_of(options), *named.values())
    return launch(target, num_ranks, *every, device=options.device)[0]


def setup_of(options: argparse.Namespace) -> Setup:
    """What the arguments of `add_model` say of ranks. Raises `ConfigError`."""
    limits = Limits(options.max_sequences, options.cache_tokens, options.max_positions)
    return Setup(options.tensor_size, options.pipeline_size, limits)


def _generation(options: argparse.Namespace) -> Generation:
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed, options.repetition_penalty)
    return Generation(
        options.max_new_tokens, options.v2pe_numerator, sampling, tuple(options.stop), tuple(options.stop_id)
    )


def _prompts(options: argparse.Namespace, file: Path | None, name: str) -> list[Prompt]:
    """What is asked: the question, or what is in a file."""
    if file is not None:
        _refuse_question(options, name)
        return _read_prompts(file)
    if options.question is None:
        raise UserError(f"nothing is asked; give a question{f', or {name} FILE' if name else ''}")
    return [
        Prompt(
            options.question,
            tuple(options.image),
            options.system,
            answer_start=options.answer_start,
            video=options.video,
            num_frames=options.frames,
        )
    ]


def _refuse_question(options: argparse.Namespace, name: str) -> None:
    if options.question is not None or options.image or options.video:
        raise UserError(f"{name} brings its own questions and images; leave the others out")


def _read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a jsonl file. Raises `DataError` that names file, line and field."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a jsonl file with a question a line")
    file = JsonlFile(path)
    prompts = []
    for index in range(len(file)):
        raw, where = file.read(index), file.where(index)
        if unknown := raw.keys() - {"id", "question", "image", "video", "system"}:
            raise DataError(
                f"{where}: unknown field {sorted(unknown)[0]!r}; fields are question, image, video, system, id"
            )
        images = raw.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise DataError(f"{where}: field 'image': must be a path or a list of paths")
        for name in ("question", "video", "system"):
            if not isinstance(raw.get(name, None if name != "question" else 0), str | None):
                raise DataError(f"{where}: field {name!r}: must be a text")
        video = raw.get("video")
        prompts.append(
            Prompt(
                raw["question"],
                tuple(str(path.parent / image) for image in images),
                raw.get("system"),
                video=None if video is None else str(path.parent / video),
            )
        )
    return prompts


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a text file") from error
