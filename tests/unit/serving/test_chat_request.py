"""Whatever a body holds, it is a request or is refused as the client's fault; requests mean what they say."""

import base64
import json
import random
from typing import Any

import pytest

from internvl_megatron.inference.settings import Sampling
from internvl_megatron.serving.chat_request import read_chat_request
from internvl_megatron.serving.errors import ApiError

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64," + base64.b64encode(b"bytes").decode()}}
WHOLE: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "developer", "content": "be short"},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "one?"}], "name": "somebody"},
        {"role": "assistant", "content": "1", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "two?"},
    ],
    "temperature": 0.5,
    "top_p": 0.9,
    "max_completion_tokens": 7,
    "max_tokens": None,
    "stop": "x",
    "seed": 5,
    "n": 2,
    "stream": True,
    "stream_options": {"include_usage": True},
    "frequency_penalty": 0,
    "response_format": {"type": "text"},
    "user": "somebody",
    "top_k": 3,
    "repetition_penalty": 1.1,
}


def read(body: Any):
    return read_chat_request(json.dumps(body).encode(), 100, 8)


def test_every_field_arrives():
    asked = read(WHOLE)
    assert (asked.model, asked.system, asked.question) == ("m", "be short", "two?")
    assert asked.history == (("<image>\none?", "1"),)
    assert [(image.where, image.content) for image in asked.images] == [
        ("messages[1].content[0].image_url.url", b"bytes")
    ]
    assert asked.settings.sampling == Sampling(0.5, 3, 0.9, 0, 1.1)
    assert (asked.settings.max_new_tokens, asked.settings.stop_strings) == (7, ("x",))
    assert (asked.seed, asked.num_answers, asked.is_streamed, asked.with_usage) == (5, 2, True, True)


def test_a_temperature_of_nearly_nothing_is_nothing():
    assert read(WHOLE | {"temperature": 1e-300}).settings.sampling.is_greedy


def test_what_is_not_said():
    asked = read({"model": "m", "messages": [{"role": "user", "content": "x"}]})
    assert asked.settings.sampling == Sampling(temperature=1), "the default of OpenAI's interface"
    assert (asked.system, asked.history, asked.images, asked.seed) == (None, (), (), None)
    assert (asked.settings.max_new_tokens, asked.num_answers, asked.is_streamed) == (100, 1, False)


VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, 1e308, "", "x", "<image>", "\ud800", "data:;base64,", "data:image/png;base64,AAAA=A",
    "data:" + ";" * 300 + "base64,", [], [[]], [None], {}, {"": None}, {"type": "text"}, IMAGE, {"type": ["text"]},
]  # fmt: skip


def changed(value: Any, random_: random.Random) -> Any:
    """A copy of which one part, anywhere, is another value, or has another name, or is gone."""
    if random_.random() < 0.2 or not (isinstance(value, dict | list) and value):
        return random_.choice(VALUES)
    if isinstance(value, list):
        place = random_.randrange(len(value))
        return [changed(part, random_) if number == place else part for number, part in enumerate(value)]
    name = random_.choice(list(value))
    rest = {other: part for other, part in value.items() if other != name}
    match random_.randrange(4):
        case 0:
            return rest
        case 1:
            return rest | {random_.choice(["", "x" * 500, "\ud800", "rôle", name + "s"]): value[name]}
        case _:
            return value | {name: changed(value[name], random_)}


def test_changed_requests_are_read_or_refused_by_field():
    random_, refused, num_read = random.Random(3), set(), 0
    for _ in range(4000):
        body = changed(WHOLE, random_)
        if random_.random() < 0.3:
            body = changed(body, random_)
        try:
            read(body)
            num_read += 1
        except ApiError as error:
            assert error.status == 400
            assert len(str(error)) < 1500
            json.dumps(error.body, ensure_ascii=False).encode()
            refused.add(error.param)
    assert num_read > 100
    assert len(refused) > 40, "the changes reach every field"


@pytest.mark.parametrize("size", [1, 50, 500])
def test_changed_bytes(size):
    random_ = random.Random(size)
    text = bytearray(json.dumps(WHOLE).encode())
    for _ in range(300):
        broken = bytearray(text)
        for _ in range(random_.randrange(1, size + 1)):
            broken[random_.randrange(len(broken))] = random_.randrange(256)
        try:
            read_chat_request(bytes(broken), 100, 8)
        except ApiError as error:
            assert error.status == 400
