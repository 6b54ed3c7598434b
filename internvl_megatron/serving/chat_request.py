"""What a chat completion asks for, checked field by field. Nothing heavy happens here: images are bytes that nobody has looked at.

Parts of a user's message stand in the prompt as they come, one a line; an image followed by a question is so the prompt that
models are trained with, `<image>\\nquestion`.
"""

import base64
import binascii
import json
import re
from dataclasses import dataclass
from typing import Any

from internvl_megatron.data.conversation import IMAGE_PLACEHOLDER
from internvl_megatron.inference.settings import Generation, Sampling
from internvl_megatron.serving.errors import ApiError, bad_field
from internvl_megatron.serving.fields import Fields, checked_text

MOST_IMAGES = 256
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
LOWEST_TEMPERATURE = 1e-5
"""Below it the most likely token is taken: scores over it would be beyond fp32."""
LARGEST_SEED = (1 << 63) - 1

_READ = {
    "model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "n", "stream",
    "stream_options", "top_k", "repetition_penalty",
}  # fmt: skip
_WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""They are about accounts and records, which there are none of."""
_NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "top_logprobs": 0, "tools": [],
    "tool_choice": "none", "parallel_tool_calls": True, "functions": [], "function_call": "none",
    "response_format": {"type": "text"}, "modalities": ["text"], "audio": {}, "prediction": {}, "reasoning_effort": "none",
    "verbosity": "medium", "web_search_options": {},
}  # fmt: skip
"""Fields of OpenAI's that would change answers, by the value that does not."""
_OF_ANSWERS: dict[str, Any] = {"refusal": "", "tool_calls": [], "function_call": {}, "audio": {}, "annotations": []}
"""Fields that a message has when it is an answer that is sent back."""

_DATA_URL = re.compile(r"data:(?P<type>[^;,]{0,100})(?:;[^;,]{0,100})*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class SentImage:
    """An image as it came."""

    where: str
    """Path of its field."""
    content: bytes


@dataclass(frozen=True)
class ChatRequest:
    """What is asked, and how."""

    model: str
    system: str | None
    history: tuple[tuple[str, str], ...]
    question: str
    images: tuple[SentImage, ...]
    """In the order of `<image>` in the questions."""
    settings: Generation
    """Its seed is 0: see `seed`."""
    seed: int | None
    """None = any."""
    num_answers: int
    is_streamed: bool
    with_usage: bool
    """Whether a stream ends with how many tokens there were."""


def read_chat_request(body: bytes, default_new_tokens: int, most_answers: int) -> ChatRequest:
    """Read a request's body.

    Args:
        body: JSON.
        default_new_tokens: longest answer where the request does not say.
        most_answers: that can be asked for at a time.

    Raises:
        ApiError: it asks for something that there is not; names the field.
    """
    fields = Fields(_parse(body))
    fields.refuse_others(_READ | _WITHOUT_EFFECT, _NEUTRAL)
    model = fields.text("model")
    system, history, question, images = _read_messages(fields.get("messages"))
    is_streamed = fields.flag("stream")
    return ChatRequest(
        model,
        system,
        history,
        question,
        images,
        _read_settings(fields, default_new_tokens),
        None if fields.get("seed") is None else fields.integer("seed", 0, 0, LARGEST_SEED),
        fields.integer("n", 1, 1, most_answers),
        is_streamed,
        _read_stream_options(fields, is_streamed),
    )


def _parse(body: bytes) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError as error:
        raise ApiError(400, "body: is nested too deep", code="invalid_json") from error
    except ValueError as error:  # UnicodeDecodeError is one
        raise ApiError(400, f"body: is no JSON ({error})", code="invalid_json") from error


def _read_settings(fields: Fields, default_new_tokens: int) -> Generation:
    newer = fields.get("max_completion_tokens") is not None
    if newer and fields.get("max_tokens") is not None:
        raise bad_field("max_tokens", "is the older name of max_completion_tokens; give one of them")
    limit_name = "max_completion_tokens" if newer else "max_tokens"
    stops = fields.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not (isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(stop, str) for stop in stops)):
        raise bad_field("stop", f"must be a text or a list of at most {MOST_STOPS} texts")
    if not all(0 < len(stop) <= MOST_STOP_CHARACTERS for stop in stops):
        raise bad_field("stop", f"texts must have 1 to {MOST_STOP_CHARACTERS} characters")
    temperature = fields.number("temperature", 1, 0, 2)
    sampling = Sampling(
        temperature=temperature if temperature >= LOWEST_TEMPERATURE else 0,
        top_k=fields.integer("top_k", 0, 0, 1 << 31),
        top_p=fields.number("top_p", 1, 0, 1) or 1e-9,  # 0 is allowed there; it leaves the most likely token
        repetition_penalty=fields.number("repetition_penalty", 1, 0.01, 100),
    )
    return Generation(
        fields.integer(limit_name, default_new_tokens, 1, 1 << 31),
        sampling=sampling,
        stop_strings=tuple(checked_text(stop, "stop") for stop in stops),
    )


def _read_stream_options(fields: Fields, is_streamed: bool) -> bool:
    raw = fields.get("stream_options")
    if raw is None:
        return False
    if not is_streamed:
        raise bad_field("stream_options", "is for streams; set stream to true, or leave it out")
    options = Fields(raw, "stream_options")
    options.refuse_others({"include_usage"}, {"include_obfuscation": False})
    return options.flag("include_usage")


type _Conversation = tuple[str | None, tuple[tuple[str, str], ...], str, tuple[SentImage, ...]]


def _read_messages(raw: Any) -> _Conversation:
    """System turn, earlier turns, question and images of a conversation: users and assistants take turns, a user is last."""
    if not isinstance(raw, list) or not raw:
        raise bad_field("messages", "must be a list of at least one message")
    system: str | None = None
    texts: list[str] = []
    images: list[SentImage] = []
    for number, message in enumerate(raw):
        where = f"messages[{number}]"
        fields = Fields(message, where)
        fields.refuse_others({"role", "content", "name"}, _OF_ANSWERS)
        role = fields.text("role")
        if role in {"system", "developer"}:
            if number:
                raise bad_field(f"{where}.role", "a system message must be the first; join it to that")
            system = _read_content(fields, None)
            continue
        expected = ("user", "assistant")[len(texts) % 2]
        if role != expected:
            raise bad_field(
                f"{where}.role",
                f"must be {expected!r} here, not {role[:50]!r}: users and assistants take turns, and a user begins",
            )
        texts.append(_read_content(fields, images if role == "user" else None))
    if len(texts) % 2 == 0:
        raise bad_field("messages", "must end with a user's message, which is then answered")
    history = tuple(zip(texts[:-1:2], texts[1::2], strict=True))
    return system, history, texts[-1], tuple(images)


def _read_content(fields: Fields, images: list[SentImage] | None) -> str:
    """Text of a message, with `<image>` for its images, which are put with the others; None = it can have none."""
    raw, path = fields.get("content"), fields.path("content")
    if isinstance(raw, str):
        return _plain(fields.text("content"), path)
    if not isinstance(raw, list) or not raw:
        raise bad_field(path, "must be a text or a list of at least one part")
    lines = []
    for number, part in enumerate(raw):
        own = Fields(part, f"{path}[{number}]")
        kind = own.text("type")
        if kind == "text":
            own.refuse_others({"type", "text"}, {})
            lines.append(_plain(own.text("text"), own.path("text")))
        elif kind == "image_url" and images is not None:
            own.refuse_others({"type", "image_url"}, {})
            if len(images) == MOST_IMAGES:
                raise bad_field("messages", f"have more than {MOST_IMAGES} images; send fewer")
            images.append(_read_image(own))
            lines.append(IMAGE_PLACEHOLDER)
        else:
            allowed = "'text'" if images is None else "'text' or 'image_url'"
            raise bad_field(own.path("type"), f"must be {allowed} here, not {kind[:50]!r}")
    return "\n".join(lines)


def _plain(text: str, path: str) -> str:
    if IMAGE_PLACEHOLDER in text:
        raise bad_field(
            path, f"has {IMAGE_PLACEHOLDER}, which says where an image goes; send it as a part, or write it otherwise"
        )
    return text


def _read_image(part: Fields) -> SentImage:
    image = Fields(part.get("image_url"), part.path("image_url"))
    image.refuse_others({"url", "detail"}, {})
    url, where = image.text("url"), image.path("url")
    found = _DATA_URL.match(url)
    if found is None:
        raise bad_field(
            where,
            "must be a data URL, data:image/png;base64,...; this server fetches nothing: fetch the image and send its bytes",
        )
    try:
        content = base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: is not base64 ({error})", where, "invalid_base64") from error
    if not content:
        raise ApiError(400, f"{where}: has no bytes", where, "invalid_image")
    return SentImage(where, content)
