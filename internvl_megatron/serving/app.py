"""The server's paths: completions, models, health, figures, and a page to talk to the model."""

import base64
import hashlib
import hmac
import re
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from internvl_megatron.serving.chat_completions import RETRY_SECONDS, ChatCompletions
from internvl_megatron.serving.engine import Engine
from internvl_megatron.serving.errors import ApiError
from internvl_megatron.serving.figures import Figures
from internvl_megatron.serving.settings import Serving

PAGE = Path(__file__).with_name("page.html")


def make_app(
    serving: Serving, api_key: str | None, chat: ChatCompletions, engine: Engine, figures: Figures, created: int
) -> Starlette:
    """The application.

    Args:
        serving: how.
        api_key: that requests below `/v1` must bring; None = none.
        chat: answers completions.
        engine: of the model.
        figures: what is counted.
        created: when the model was loaded, in seconds since 1970.
    """
    page = PAGE.read_text(encoding="utf-8")
    page_headers = {"content-security-policy": page_policy(page), "referrer-policy": "no-referrer"}
    model = {"id": serving.name, "object": "model", "created": created, "owned_by": "internvl_megatron"}

    async def show_page(_: Request) -> Response:
        return HTMLResponse(page, headers=page_headers)

    async def health(_: Request) -> Response:
        if engine.is_stopping:
            return JSONResponse({"status": "stopping"}, 503)
        return JSONResponse({"status": "ok"})

    async def metrics(_: Request) -> Response:
        gauges = {
            "open_requests": ("Requests that are read, wait or are answered", chat.num_open),
            "waiting_sequences": ("Answers that have not begun", engine.num_waiting),
            "active_sequences": ("Answers that grow: slots of the cache in use", engine.num_active),
        }
        return PlainTextResponse(figures.text(gauges), media_type="text/plain; version=0.0.4")

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != serving.name:
            raise ApiError(404, f"model {name[:100]!r} is not here; this server has {serving.name!r}", "model")
        return JSONResponse(model)

    return Starlette(
        routes=[
            Route("/", show_page),
            Route("/health", health),
            Route("/metrics", metrics),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=serving.host_names, www_redirect=False),
            Middleware(_SafeHeaders),
            *([] if api_key is None else [Middleware(_KeyCheck, api_key=api_key)]),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _our_error},
    )


def page_policy(page: str) -> str:
    """A content security policy that lets the page's own scripts and styles run, talk to this server, and nothing else."""
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _SafeHeaders:
    """Browsers shall take every response for what it says it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [*message.get("headers", []), (b"x-content-type-options", b"nosniff")],
                }
            await send(message)

        await self._app(scope, receive, with_header)


class _KeyCheck:
    """Lets requests below `/v1` pass that bring the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            brought = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(brought, self._expected):
                error = ApiError(401, "authorization: must be Bearer and the server's key", code="invalid_api_key")
                response = JSONResponse(error.body, 401, {"www-authenticate": "Bearer"})
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), f"{type(error).__name__} is handled elsewhere"
    headers = {"retry-after": str(RETRY_SECONDS)} if error.status in {429, 503} else None
    return JSONResponse(error.body, error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """What Starlette has to say itself: paths and methods that there are not."""
    assert isinstance(error, HTTPException), f"{type(error).__name__} is handled elsewhere"
    message = f"{request.method} {request.url.path[:100]}: {error.detail}; there is POST /v1/chat/completions and GET /v1/models"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _our_error(_: Request, error: Exception) -> Response:
    """Its traceback is in the server's log, and is no business of clients."""
    return JSONResponse(ApiError(500, f"{type(error).__name__} in the server; see its log").body, 500)
