"""The engine as a model of lmms-eval (0.7.3): `lmms-eval --model internvl_megatron --model_args pretrained=FOLDER ...`.

Only lmms-eval imports this module, by the name in `lmms_eval_plugin.py`.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from internvl_megatron.errors import ConfigError
from internvl_megatron.evaluate.lmms_eval_requests import as_generation, as_prompt
from internvl_megatron.evaluate.lone_engine import LoneEngine
from internvl_megatron.evaluate.streamed_answers import streamed_answers
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.scoring import score_continuations
from internvl_megatron.inference.settings import Generation


class InternVLMegatron(lmms):
    """One process, whatever is asked of it in packed batches."""

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        max_sequences: int | None = None,
        max_tiles: int = 12,
        num_frames: int = 32,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            pretrained: folder (`LoneEngine`).
            device: `LoneEngine`'s.
            max_sequences: answers that grow together.
            max_tiles: of each picture; fewer where a question has many (lmms-eval's InternVL3).
            num_frames: of a video.
            batch_size: not used: `max_sequences` is in its place.
            max_batch_size: not used either.

        Raises:
            UserError: `LoneEngine`'s.
        """
        super().__init__()
        self._max_tiles, self._num_frames = max_tiles, num_frames
        self._engine = LoneEngine(str(pretrained), device, max_sequences)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers, in the order of the requests. Those with the same settings are under way together."""
        groups: dict[Generation, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(as_generation(request.args[1]), []).append(number)
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), desc="Model Responding") as bar:
            for generation, own in groups.items():

                def prompt_of(place: int, folder: Path, own: Sequence[int] = own) -> Prompt:
                    return self._prompt(requests[own[place]].args, folder)

                for place, answer in streamed_answers(self._engine.generator, len(own), prompt_of, generation):
                    answers[own[place]] = answer.text
                    bar.update()
        return [answers[number] for number in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """How likely continuations are, and whether the most likely tokens spell them.

        Of a task with choices the number is the negative log-probability: lmms-eval takes the choice with the least of it
        (`ConfigurableTask.process_results`). Of a task of the type `loglikelihood` it is the log-probability.
        Pairs come wrapped: lmms-eval 0.7.3 makes a text of a bare one (`unwrap_generation_output`), which it then cannot read.
        """
        found: dict[int, tuple[float, bool]] = {}
        by_document: dict[tuple[Any, ...], list[int]] = {}
        for number, request in enumerate(requests):
            if len(request.args) < 6:
                raise ConfigError("acc_mutual_info: asks for choices without a document; take it out of metric_list")
            context, _, _, document, task, split = request.args
            by_document.setdefault((context, document, task, split), []).append(number)
        for own in tqdm(by_document.values(), desc="Model Scoring"):
            with tempfile.TemporaryDirectory(prefix="internvl-evaluation-") as folder:
                first = requests[own[0]].args
                prompts = [self._prompt(first, Path(folder))]
                wanted = [requests[number].args[1] for number in own]
                texts = [str(one(self._document(first))) if callable(one) else one for one in wanted]
                (scores,) = score_continuations(self._engine.generator, prompts, [texts])
                longest = max(len(score.token_ids) for score in scores)
                (greedy,) = self._engine.generator.generate(prompts, Generation(longest))
            for number, one, score in zip(own, wanted, scores, strict=True):
                is_greedy = greedy.token_ids[: len(score.token_ids)] == score.token_ids
                found[number] = (score.total if callable(one) else -score.total, is_greedy)
        return [GenerationResult(found[number]) for number in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refused: what is asked next would depend on the answers so far. Raises `ConfigError`."""
        raise ConfigError(
            f"{len(requests)} requests of several rounds: not supported; choose tasks whose output_type is generate_until, "
            "loglikelihood or multiple_choice"
        )

    def clean(self) -> None:
        """Called when all is answered."""
        self._engine.close()
        del self._engine
        super().clean()

    def _document(self, arguments: Sequence[Any]) -> Any:
        _, _, _, document, task, split = arguments
        return self.task_dict[task][split][document]

    def _prompt(self, arguments: Sequence[Any], folder: Path) -> Prompt:
        context, _, doc_to_visual, document, task, split = arguments
        visuals: Any = doc_to_visual(self._document(arguments)) if callable(doc_to_visual) else None
        where = f"{task}, document {document} of {split}"
        return as_prompt(context, visuals, folder, where, self._max_tiles, self._num_frames)
