"""`serve`: a model behind OpenAI's chat completions interface, with a page to talk to it."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from internvl_megatron.errors import UserError
from internvl_megatron.inference_commands import add_model, add_stride, setup_of
from internvl_megatron.serving.settings import API_KEY_VARIABLE, Serving

SERVE = "internvl_megatron.serving.run:serve_rank"


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command's arguments."""
    serve = commands.add_parser(
        "serve",
        help="answer requests over HTTP, as OpenAI's interface has them, and show a page to talk to the model",
        epilog=f"Clients must bring the key that the environment variable {API_KEY_VARIABLE} holds, if it is set.",
    )
    add_model(serve)
    default = Serving("model")
    serve.add_argument("--name", help="what requests call the model (default: the folder's name)")
    serve.add_argument("--host", default=default.host, help=f"address to listen at (default: {default.host})")
    serve.add_argument("--port", type=int, default=default.port, help=f"0 = any free one (default: {default.port})")
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        help="a name by which the server is called; may be given several times",
    )
    serve.add_argument(
        "--max-new-tokens",
        type=int,
        default=default.default_new_tokens,
        help="longest answer to requests that do not say",
    )
    serve.add_argument(
        "--max-requests", type=int, default=default.max_requests, help="at a time; more are sent away with 429"
    )
    serve.add_argument(
        "--max-body-bytes", type=int, default=default.max_body_bytes, help="of a request with its images"
    )
    serve.add_argument("--request-seconds", type=float, default=default.request_seconds, help="for a request in all")
    serve.add_argument(
        "--drain-seconds",
        type=float,
        default=default.drain_seconds,
        help="for what is begun, when the server is to stop",
    )
    add_stride(serve)
    serve.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"{package} is not installed; pip install 'internvl_megatron[serve]'")
    from internvl_megatron.launcher import InterruptedRunError, launch

    serving = Serving(
        options.name or options.model.resolve().name,
        options.host,
        options.port,
        tuple(options.allow_host),
        options.max_new_tokens,
        options.max_requests,
        options.max_body_bytes,
        options.v2pe_numerator,
        options.request_seconds,
        options.drain_seconds,
    )
    setup = setup_of(options)
    num_ranks = setup.tensor_size * setup.pipeline_size
    if options.nproc not in {None, num_ranks}:
        raise UserError(
            f"--nproc {options.nproc}: a server is one replica, of {num_ranks} ranks here; for more, start more servers "
            "behind a load balancer"
        )
    try:
        launch(
            SERVE,
            num_ranks,
            Path(options.model),
            serving,
            options.device,
            setup,
            device=options.device,
        )
    except InterruptedRunError as error:
        if not error.in_order:
            raise
    return 0
