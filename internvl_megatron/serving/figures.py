"""What a server counts, as the text that Prometheus reads.

Each figure is changed by one thread only and read by others: no lock is needed. The text format is a line a figure, so that no
package is needed to write it.
"""

from collections import Counter
from collections.abc import Mapping

PREFIX = "internvl_megatron"


class Figures:
    """Since the server began."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_tokens = 0
        self._step_seconds = 0.0
        self._responses: Counter[int] = Counter()
        self._num_prompt_tokens = 0
        self._num_images = 0
        self._num_first_tokens = 0
        self._first_token_seconds = 0.0

    def count_step(self, num_tokens: int, seconds: float) -> None:
        """A step of the batch has given so many sequences a token. Called by the model's thread."""
        self._num_steps += 1
        self._num_tokens += num_tokens
        self._step_seconds += seconds

    def count_response(self, status: int) -> None:
        """A completion's response has ended; 499 = the client has gone. Called by the server's thread, as all below."""
        self._responses[status] += 1

    def count_prompt(self, num_tokens: int, num_images: int) -> None:
        """A prompt was taken."""
        self._num_prompt_tokens += num_tokens
        self._num_images += num_images

    def count_first_token(self, seconds: float) -> None:
        """A request has its first token, so long after it came."""
        self._num_first_tokens += 1
        self._first_token_seconds += seconds

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All figures; gauges are what things are at the moment: what each means and its value, by name."""
        lines = []
        for name, (meaning, value) in gauges.items():
            lines += [*_head(name, "gauge", meaning), f"{PREFIX}_{name} {value:g}"]
        lines += _head(
            "responses_total", "counter", "Responses to completions by HTTP status; 499 = the client has gone"
        )
        lines += [
            f'{PREFIX}_responses_total{{status="{status}"}} {count}'
            for status, count in sorted(self._responses.items())
        ]
        for name, meaning, value in (
            ("generated_tokens_total", "Tokens of answers", self._num_tokens),
            ("prompt_tokens_total", "Tokens of prompts, those of images included", self._num_prompt_tokens),
            ("images_total", "Images of prompts", self._num_images),
        ):
            lines += [*_head(name, "counter", meaning), f"{PREFIX}_{name} {value}"]
        for name, meaning, total, count in (
            ("step_seconds", "Steps of the batch", self._step_seconds, self._num_steps),
            (
                "first_token_seconds",
                "From a request's arrival to its first token",
                self._first_token_seconds,
                self._num_first_tokens,
            ),
        ):
            lines += _head(name, "summary", meaning)
            lines += [f"{PREFIX}_{name}_sum {total:.6f}", f"{PREFIX}_{name}_count {count}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {meaning}", f"# TYPE {PREFIX}_{name} {kind}"]
