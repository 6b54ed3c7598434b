"""A real server and OpenAI's own client: answers are those of `generate`, wrong requests are refused, and clients may vanish."""

import asyncio
import base64
import http.client
import io
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from PIL import Image

from internvl_megatron.__main__ import main
from internvl_megatron.inference.prompt import Prompt
from internvl_megatron.inference.settings import Generation, Sampling
from tests.support.random_chat import write_random_chat
from tests.support.served_model import Served, answers_alone, serving

pytestmark = pytest.mark.parallel

MAX_NEW_TOKENS = 12
SERVED_OPTIONS = ("--name", "small", "--max-body-bytes", "2000000", "--max-positions", "2000", "--max-sequences", "8")


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def picture(seed: int, squares: int = 1) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28 * squares, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def user(*parts: str | bytes) -> Any:
    """A user's message: texts, and pictures as bytes."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in parts
    ]
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_chat(tmp_path_factory.mktemp("served") / "model", seed=1)


@pytest.fixture(scope="module")
def served(model):
    with serving(model, *SERVED_OPTIONS) as started:
        yield started


@pytest.fixture(scope="module")
def client(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none is asked for", max_retries=0, timeout=300)


@pytest.fixture
def create(client):
    def ask(messages, **settings):
        given = {"model": "small", "temperature": 0, "max_tokens": MAX_NEW_TOKENS, **settings}
        return client.chat.completions.create(messages=messages, **given)

    return ask


@pytest.fixture
def post(served):
    """Sends a body as it is; status, headers and the JSON of the answer."""

    def send(body, path="/v1/chat/completions", method="POST", **headers):
        connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=300)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, body, {"content-type": "application/json", **headers})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, dict(response.getheaders()), json.loads(content)

    return send


def body(**changes):
    asked = {"model": "small", "messages": [{"role": "user", "content": "how many?"}], "max_tokens": 3} | changes
    return {name: value for name, value in asked.items() if value is not ...}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Messages, and the same as prompts of `generate`."""
    folder = tmp_path_factory.mktemp("pictures")
    one, two = picture(1), picture(2, squares=3)
    for name, content in (("one.png", one), ("two.png", two)):
        (folder / name).write_bytes(content)
    paths = [str(folder / name) for name in ("one.png", "two.png")]
    return [
        ([{"role": "user", "content": "how many?"}], Prompt("how many?")),
        ([user(one, "how many digits?")], Prompt("<image>\nhow many digits?", (paths[0],))),
        (
            [{"role": "system", "content": "digits"}, user("which of", one, two, "is it?")],
            Prompt("which of\n<image>\n<image>\nis it?", tuple(paths), "digits"),
        ),
        (
            [user(two, "two?"), {"role": "assistant", "content": "there are two"}, user("digits?")],
            Prompt("digits?", (paths[1],), history=(("<image>\ntwo?", "there are two"),)),
        ),
    ]


@pytest.fixture(scope="module")
def expected(run_ranks, model, questions):
    """What `generate` answers, each prompt by itself: the most likely answers, and drawn ones."""
    prompts = [prompt for _, prompt in questions]
    settings = [
        Generation(MAX_NEW_TOKENS, sampling=sampling)
        for sampling in (Sampling(), Sampling(temperature=1.3, top_p=0.9, seed=11))
    ]
    return run_ranks(answers_alone, 1, model, prompts, settings)[0]


def test_answers_are_those_of_generate(create, questions, expected):
    """All at once, so that they share the batch."""
    greedy, drawn = expected
    with ThreadPoolExecutor(2 * len(questions)) as pool:
        likely = [pool.submit(create, messages) for messages, _ in questions]
        sampled = [pool.submit(create, messages, temperature=1.3, top_p=0.9, seed=11) for messages, _ in questions]
        answers = [[one.result() for one in group] for group in (likely, sampled)]
    texts = [[one.choices[0].message.content for one in group] for group in answers]
    assert texts == [greedy, drawn]
    assert greedy != drawn
    for answer in answers[0]:
        assert answer.choices[0].finish_reason in {"stop", "length"}
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        if answer.choices[0].finish_reason == "length":
            assert answer.usage.completion_tokens == MAX_NEW_TOKENS


def test_streams_add_up_to_the_answer(create, questions, expected):
    for (messages, _), text in zip(questions, expected[0], strict=True):
        chunks = list(create(messages, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
        ends = [c.choices[0].finish_reason for c in chunks if c.choices]
        assert ends[-1] in {"stop", "length"} and not any(ends[:-1])
        assert chunks[-1].usage.completion_tokens <= MAX_NEW_TOKENS
        assert len({chunk.id for chunk in chunks}) == 1


def test_several_answers_and_stops(create):
    messages = [user("how many?")]
    settings = {"temperature": 1.5, "seed": 3, "max_tokens": 8}
    three = create(messages, n=3, **settings)
    texts = [choice.message.content for choice in three.choices]
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert create(messages, **settings).choices[0].message.content == texts[0]
    streamed = ["", "", ""]
    for chunk in create(messages, n=3, stream=True, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    stop = texts[0][2:4]
    assert stop.strip(), "the first answer has text to stop at"
    cut = create(messages, stop=[stop], **settings).choices[0]
    assert (cut.message.content, cut.finish_reason) == (texts[0].split(stop)[0].rstrip(), "stop")


def test_other_paths(client, served, post):
    assert [one.id for one in client.models.list()] == ["small"]
    assert client.models.retrieve("small").owned_by == "internvl_megatron"
    assert post(b"", "/health", "GET")[::2] == (200, {"status": "ok"})
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")
    status, _, answer = post(b"", "/v1/completions")
    assert status == 404 and "POST /v1/chat/completions" in answer["error"]["message"]
    assert post(b"", method="GET")[0] == 405
    for wrong in ("evil.example", "127.0.0.1.evil.example"):
        connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=60)
        connection.request("GET", "/v1/models", headers={"host": wrong})
        assert connection.getresponse().status == 400


BOMB = Image.new("1", (20_000, 20_000))


def bomb() -> bytes:
    """Kilobytes that are an image of 400 million pixels."""
    file = io.BytesIO()
    BOMB.save(file, "PNG")
    return file.getvalue()


def image_body(url):
    return body(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'/>"
WRONG = {
    "no JSON": (b'{"model": "small"', 400, None, "body: is no JSON"),
    "no number": (b'{"temperature": NaN}', 400, None, "NaN is no JSON"),
    "no UTF-8": (b'{"model": "\xff"}', 400, None, "body: is no JSON"),
    "deep": (b"[" * 100_000, 400, None, "body: is nested too deep"),
    "a list": ([], 400, "body", "must be an object, not a list"),
    "no model": (body(model=...), 400, "model", "is missing"),
    "another model": (body(model="large"), 404, "model", "this server has 'small'"),
    "no messages": (body(messages=...), 400, "messages", "must be a list"),
    "empty": (body(messages=[]), 400, "messages", "at least one message"),
    "a word": (body(messages=["x"]), 400, "messages[0]", "must be an object, not a text"),
    "no role": (body(messages=[{"content": "x"}]), 400, "messages[0].role", "is missing"),
    "another role": (body(messages=[{"role": "tool", "content": "x"}]), 400, "messages[0].role", "must be 'user' here"),
    "system last": (
        body(messages=[user("x"), {"role": "system", "content": "x"}]), 400, "messages[1].role", "must be the first",
    ),
    "assistant last": (
        body(messages=[user("x"), {"role": "assistant", "content": "x"}]), 400, "messages", "must end with a user's",
    ),
    "no content": (body(messages=[{"role": "user"}]), 400, "messages[0].content", "must be a text or a list"),
    "a placeholder": (body(messages=[user("<image>")]), 400, "messages[0].content[0].text", "send it as a part"),
    "half a character": (
        b'{"model": "small", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages[0].content",
        "half a surrogate pair",
    ),
    "another part": (
        body(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]), 400, "messages[0].content[0].type",
        "must be 'text' or 'image_url' here",
    ),
    "system's image": (
        body(messages=[{**user(b"x"), "role": "system"}, user("x")]), 400, "messages[0].content[0].type",
        "must be 'text' here",
    ),
    "a hot one": (body(temperature=9), 400, "temperature", "must be 0 to 2, not 9"),
    "a text": (body(temperature="hot"), 400, "temperature", "must be a number, not a text"),
    "truth": (body(max_tokens=True), 400, "max_tokens", "must be a number, not true or false"),
    "half a token": (body(max_tokens=1.5), 400, "max_tokens", "must be a whole number"),
    "no tokens": (body(max_tokens=0), 400, "max_tokens", "must be 1 to"),
    "both limits": (body(max_completion_tokens=3), 400, "max_tokens", "give one of them"),
    "many answers": (body(n=9), 400, "n", "must be 1 to 8, not 9"),
    "a seed": (body(seed=-1), 400, "seed", "must be 0 to"),
    "no stop": (body(stop=""), 400, "stop", "1 to 256 characters"),
    "stops": (body(stop=["x"] * 17), 400, "stop", "at most 16"),
    "usage": (body(stream_options={"include_usage": True}), 400, "stream_options", "set stream to true"),
    "a typo": (body(temprature=1), 400, "temprature", "did you mean 'temperature'?"),
    "tools": (body(tools=[{"type": "function"}]), 400, "tools", "is not supported"),
    "logprobs": (body(logprobs=True), 400, "logprobs", "is not supported"),
    "a long prompt": (body(messages=[user("x " * 9000)]), 400, "messages", "the context has 2000"),
    "a long answer": (body(max_tokens=5000), 400, "messages", "the context has 2000"),
    "an address": (
        image_body("http://169.254.169.254/latest"), 400, "messages[0].content[0].image_url.url", "fetches nothing",
    ),
    "a file": (image_body("file:///etc/passwd"), 400, "messages[0].content[0].image_url.url", "fetches nothing"),
    "no base64": (
        image_body("data:image/png;base64,@@@@"), 400, "messages[0].content[0].image_url.url", "is not base64",
    ),
    "nothing": (image_body("data:image/png;base64,"), 400, "messages[0].content[0].image_url.url", "has no bytes"),
    "a drawing": (image_body(data_url(SVG)), 400, "messages[0].content[0].image_url.url", "is no image that can be read"),
    "a broken one": (
        image_body(data_url(picture(0)[:-900])), 400, "messages[0].content[0].image_url.url", "or a damaged one",
    ),
    "many images": (
        body(messages=[user(*[b"x"] * 257)]), 400, "messages", "more than 256 images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_wrong_requests(post, name):
    asked, status, param, message = WRONG[name]
    found, _, answer = post(asked)
    assert (found, answer["error"]["param"]) == (status, param), answer
    assert message in answer["error"]["message"]
    assert "Traceback" not in answer["error"]["message"] and "/tmp" not in answer["error"]["message"]


def test_too_large(post, create):
    status, _, answer = post(b" " * 2_000_001)
    assert (status, answer["error"]["code"]) == (413, "too_large")
    content = bomb()
    assert len(content) < 1_000_000
    status, _, answer = post(image_body(data_url(content)))
    assert status == 400 and "pixels" in answer["error"]["message"]
    assert create([user("how many?")]).choices, "the server goes on"


def test_a_foreign_page_cannot_ask(post):
    assert post(body(), **{"content-type": "text/plain"})[0] == 415


def half_a_request(served: Served, key: str = "") -> socket.socket:
    """A connection on which the end of a request never comes."""
    address = urlsplit(served.url)
    connection = socket.create_connection((address.hostname, address.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
    connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode())
    return connection


def test_clients_that_vanish_free_their_slots(served, create):
    """While the body is read, while they wait, and while they are answered, streaming or not."""
    address = urlsplit(served.url)
    long = {"max_tokens": 1500, "temperature": 2, "stop": None}
    connections = []
    for streamed in [True, False] * 8:
        content = json.dumps(body(stream=streamed, **long)).encode()
        connection = socket.create_connection((address.hostname, address.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        connections.append(connection)
    half = half_a_request(served)
    deadline = time.monotonic() + 60
    while served.gauge("active_sequences") + served.gauge("waiting_sequences") < 10:
        assert time.monotonic() < deadline, "they come"
        time.sleep(0.02)
    for connection in [*connections, half]:
        connection.close()
    served.wait_until_idle()
    assert served.gauge('responses_total{status="499"}') >= 1
    assert create([user("how many?")]).choices


async def stream_for(client: openai.AsyncOpenAI, seconds: float, count: int, pictures: list[bytes]) -> list[str]:
    """`count` clients that stream one answer after the other for so long; what was wrong with them."""
    answers: dict[int, str] = {}
    wrong: list[str] = []
    deadline = time.monotonic() + seconds

    async def ask(number: int) -> None:
        rounds = 0
        while rounds == 0 or time.monotonic() < deadline:
            kind = (number + rounds) % 8  # of eight questions, each seen many times
            parts = ["how many?" + " two" * kind, *([pictures[kind % len(pictures)]] if kind % 2 else [])]
            stream = await client.chat.completions.create(
                model="small", messages=[user(*parts)], temperature=1, seed=kind, max_tokens=16, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            text, end, used = "", None, None
            async for chunk in stream:
                if chunk.choices:
                    text += chunk.choices[0].delta.content or ""
                    end = chunk.choices[0].finish_reason or end
                used = chunk.usage or used
            if end is None or used is None or (end == "length" and used.completion_tokens != 16):
                wrong.append(f"{number}: {end} {used}")
            if answers.setdefault(kind, text) != text:
                wrong.append(f"{number}: {text!r} is not {answers[kind]!r}")
            rounds += 1

    await asyncio.gather(*(ask(number) for number in range(count)))
    return wrong


@pytest.mark.parametrize("seconds", [2, pytest.param(60, marks=pytest.mark.slow)])
def test_many_streams_at_once(served, seconds):
    """64 clients over 8 slots: no error, no lost token, and every question has one answer whatever it shares the batch with."""

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=300) as client:
            return await stream_for(client, seconds, 64, [picture(1), picture(2, 3)])

    assert asyncio.run(run()) == []
    served.wait_until_idle()


def test_limits_keys_and_the_end(model):
    """A server of two places, with a key: what is too much is sent away, and what has begun is finished."""
    key = "a key nobody guesses"
    options = ("--name", "small", "--max-requests", "2", "--drain-seconds", "60", "--request-seconds", "200")
    with serving(model, *options, INTERNVL_MEGATRON_API_KEY=key) as served:
        clients = [
            openai.OpenAI(base_url=f"{served.url}/v1", api_key=own, max_retries=0, timeout=300)
            for own in (key, "other")
        ]
        with pytest.raises(openai.AuthenticationError):
            clients[1].models.list()

        def ask(**settings):
            return clients[0].chat.completions.create(model="small", messages=[user("how many?")], **settings)

        halves = [half_a_request(served, key) for _ in range(2)]
        while served.gauge("open_requests") < 2:
            time.sleep(0.02)
        with pytest.raises(openai.RateLimitError) as refused:
            ask()
        assert refused.value.response.headers["retry-after"] == "1"
        for half in halves:
            half.close()
        served.wait_until_idle()
        stream = ask(stream=True, max_tokens=900, temperature=2)
        assert next(stream).choices[0].delta.role == "assistant"
        served.process.terminate()
        with pytest.raises((openai.InternalServerError, openai.APIConnectionError)):
            while True:  # until it has noticed
                ask(max_tokens=1)
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] in {"stop", "length"}
        assert served.process.wait(timeout=120) == 0


@pytest.mark.slow
def test_two_by_two_ranks_serve_alike(model, questions, expected):
    with serving(model, "--name", "small", "--tensor-size", "2", "--pipeline-size", "2") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0, timeout=300)
        for (messages, _), text in zip(questions, expected[0], strict=True):
            answer = client.chat.completions.create(
                model="small", messages=messages, temperature=0, max_tokens=MAX_NEW_TOKENS
            )
            assert answer.choices[0].message.content == text
        assert served.stop() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nproc", "2"], "--nproc 2: a server is one replica, of 1 ranks here"),
        (["--port", "70000"], "port: must be 0 (any that is free) to 65535, not 70000"),
        (["--v2pe-numerator", "0"], "v2pe_numerator: must be 1 to 256"),
        (
            ["--max-requests", "0", "--drain-seconds", "nan"],
            "max_requests: must be above 0, not 0\ndrain_seconds: must be",
        ),
    ],
)
def test_wrong_settings(model, capsys, options, message):
    assert main(["serve", str(model), *options]) == 2
    assert message in capsys.readouterr().err


def test_an_address_in_use_is_said_before_the_model_is_loaded(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path / "nothing"), "--port", str(port), "--device", "cpu"]) == 2
    assert f"127.0.0.1:{port} cannot be listened at (Address already in use); give another" in capsys.readouterr().err
