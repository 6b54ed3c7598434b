"""`POST /v1/chat/completions`: reads a request within its limits, has it answered, and lets go of it when the client does."""

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from internvl_megatron.inference.generate import Generator
from internvl_megatron.inference.prompt import End
from internvl_megatron.inference.settings import Generation
from internvl_megatron.serving.chat_request import ChatRequest, read_chat_request
from internvl_megatron.serving.engine import Engine, remove_files
from internvl_megatron.serving.errors import ApiError
from internvl_megatron.serving.figures import Figures
from internvl_megatron.serving.jobs import Grown, Job, Tell
from internvl_megatron.serving.preparation import prepare
from internvl_megatron.serving.settings import Serving

CLIENT_HAS_GONE = 499
RETRY_SECONDS = 1
PREPARATIONS = 2
"""Requests whose images are decoded at a time; one can take half a gigabyte."""

_REASONS: dict[End, str] = {"turn_end": "stop", "stop": "stop", "length": "length"}


class ChatCompletions:
    """An ASGI application of its own: what a request holds is given back where it ends, however it ends."""

    def __init__(self, serving: Serving, generator: Generator, engine: Engine, figures: Figures, folder: Path) -> None:
        """Prepare; `folder` is for images on their way."""
        self._serving = serving
        self._generator = generator
        self._engine = engine
        self._figures = figures
        self._folder = folder
        self._numbers = itertools.count()
        self._workers = ThreadPoolExecutor(PREPARATIONS, "preparation")
        self.num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began, watched = time.monotonic(), _Watched(send)
        status = CLIENT_HAS_GONE
        try:
            with self._place():
                async with asyncio.timeout(self._serving.request_seconds):
                    asked = await self._read(Request(scope, receive))
                    if await _unless_gone(self._answer(asked, began, watched), receive):
                        status = 200
        except ClientDisconnect:
            return  # before it had sent all of its request
        except TimeoutError as error:
            status = 503
            if watched.status is None:
                seconds = f"{self._serving.request_seconds:g}"
                raise ApiError(
                    503, f"not answered within {seconds} s; ask for less, or later", code="timeout"
                ) from error
        except ApiError as error:
            status = error.status
            raise
        except Exception:
            status = 500
            raise
        finally:
            self._figures.count_response(status)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places for requests, for as long as it takes."""
        if self._engine.is_stopping:
            raise ApiError(503, "the server is stopping; ask another one", code="stopping")
        if self.num_open >= self._serving.max_requests:
            raise ApiError(429, f"{self.num_open} requests are under way; try again later", code="too_many_requests")
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    async def _read(self, request: Request) -> ChatRequest:
        """The request, once all of it has come."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # what a foreign page may send without being asked is of other kinds
            raise ApiError(415, f"content-type: must be application/json, not {kind[:100]!r}", code="unsupported_type")
        largest, body = self._serving.max_body_bytes, bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > largest:
                raise ApiError(413, f"body: is over {largest} bytes; send fewer or smaller images", code="too_large")
        most_answers = self._generator.limits.max_sequences
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(
            self._workers, read_chat_request, bytes(body), self._serving.default_new_tokens, most_answers
        )
        if asked.model != self._serving.name:
            message = f"model: {asked.model[:100]!r} is not here; this server has {self._serving.name!r}"
            raise ApiError(404, message, "model", "model_not_found")
        return asked

    async def _answer(self, asked: ChatRequest, began: float, send: Send) -> None:
        """Have it answered, as a whole or as a stream."""
        grown: asyncio.Queue[Grown | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        sampling = replace(asked.settings.sampling, seed=seed)
        settings = replace(asked.settings, sampling=sampling, v2pe_numerator=self._serving.v2pe_numerator)
        job = await self._prepared(asked, settings, lambda one: loop.call_soon_threadsafe(grown.put_nowait, one))
        try:
            self._engine.submit(job)
            self._figures.count_prompt(len(job.rendered.token_ids), len(asked.images))
            growing = self._growing(grown, asked.num_answers, began)
            completion = _Completion(self._serving.name, job)
            if asked.is_streamed:
                await _stream(completion, growing, asked.with_usage, send)
            else:
                async for one in growing:
                    completion.add(one)
                await JSONResponse(completion.whole())({"type": "http"}, _nothing, send)
        finally:
            self._engine.cancel(job)

    async def _prepared(self, asked: ChatRequest, settings: Generation, tell: Tell) -> Job:
        """The request as a job, made in a thread."""
        number = next(self._numbers)
        future = self._workers.submit(prepare, self._generator, asked, settings, number, self._folder, tell)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(_forget)  # a thread that works cannot be stopped
            raise

    async def _growing(self, grown: asyncio.Queue[Grown | None], count: int, began: float) -> AsyncIterator[Grown]:
        """What the engine tells, until all answers have ended."""
        is_first = True
        while count:
            one = await grown.get()
            if one is None:
                raise ApiError(503, "the server stops before this was answered; ask another one", code="stopping")
            if is_first:
                self._figures.count_first_token(time.monotonic() - began)
                is_first = False
            count -= one.end is not None
            yield one


class _Completion:
    """A response on its way: as OpenAI's interface has it."""

    def __init__(self, model: str, job: Job) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._prompt_tokens = len(job.rendered.token_ids)
        self._texts = [""] * job.num_answers
        self._num_tokens = [0] * job.num_answers
        self._ends: list[End | None] = [None] * job.num_answers

    def add(self, one: Grown) -> None:
        """An answer has grown."""
        self._texts[one.index] += one.text
        self._num_tokens[one.index] = one.num_tokens
        self._ends[one.index] = one.end

    def whole(self) -> dict[str, Any]:
        """The finished response."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": _reason(end),
            }
            for index, (text, end) in enumerate(zip(self._texts, self._ends, strict=True))
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    def chunk(self, index: int, delta: dict[str, str], end: End | None) -> dict[str, Any]:
        """A part of one answer."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": _reason(end)}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def last_chunk(self) -> dict[str, Any]:
        """How many tokens there were."""
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        made = sum(self._num_tokens)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }


def _forget(future: "Future[Job]") -> None:
    """Remove the images of a job that nobody has waited for."""
    if not future.cancelled() and future.exception() is None:
        remove_files(future.result().prompt.images)


def _reason(end: End | None) -> str | None:
    return None if end is None else _REASONS[end]


async def _stream(completion: _Completion, growing: AsyncIterator[Grown], with_usage: bool, send: Send) -> None:
    """Send the response as server-sent events; the first one when there is a token."""
    begun: set[int] = set()
    try:
        async for one in growing:
            if not begun:
                headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            completion.add(one)
            if one.index not in begun:
                begun.add(one.index)
                await _send_event(completion.chunk(one.index, {"role": "assistant", "content": ""}, None), send)
            if one.text:
                await _send_event(completion.chunk(one.index, {"content": one.text}, None), send)
            if one.end is not None:
                await _send_event(completion.chunk(one.index, {}, one.end), send)
        if with_usage:
            await _send_event(completion.last_chunk(), send)
    except ApiError as error:
        if not begun:
            raise
        await _send_event(error.body, send)
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _send_event(content: dict[str, Any], send: Send) -> None:
    data = f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()
    await send({"type": "http.response.body", "body": data, "more_body": True})


class _Watched:
    """A way to the client that remembers the status that was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)


async def _unless_gone(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Do work, unless the client goes before it is done; whether it is done."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
