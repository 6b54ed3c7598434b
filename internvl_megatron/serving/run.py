"""Serve a model: the body of one rank. The model runs in the main thread, on every rank alike; the server in another, on the first."""

import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import uvicorn

from internvl_megatron.device import DeviceName
from internvl_megatron.errors import UserError
from internvl_megatron.faults.stop_signals import STOP_SIGNALS, StopSignals
from internvl_megatron.inference.run import open_generator
from internvl_megatron.inference.settings import Setup
from internvl_megatron.ranks import RankInfo
from internvl_megatron.serving.app import make_app
from internvl_megatron.serving.chat_completions import ChatCompletions
from internvl_megatron.serving.engine import Engine
from internvl_megatron.serving.figures import Figures
from internvl_megatron.serving.settings import API_KEY_VARIABLE, Serving

CLOSE_SECONDS = 5
"""How long connections may take to end once everything is answered."""


def serve_rank(info: RankInfo, folder: Path, serving: Serving, device: DeviceName, setup: Setup) -> None:
    """Serve until a signal asks to stop.

    Raises:
        UserError: the model cannot be loaded, or the address cannot be listened at.
    """
    if info.rank != 0:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # the first rank decides when to stop
        with open_generator(info, folder, device, setup=setup) as generator:
            Engine(generator, Figures()).follow()
        return
    signals = StopSignals()
    with (
        listening(serving.host, serving.port) as listener,  # before the model is loaded, which takes long
        tempfile.TemporaryDirectory(prefix="internvl-images-") as images,
        open_generator(info, folder, device, setup=setup) as generator,
    ):
        figures = Figures()
        engine = Engine(generator, figures)
        chat = ChatCompletions(serving, generator, engine, figures, Path(images))
        api_key = os.environ.get(API_KEY_VARIABLE) or None
        app = make_app(serving, api_key, chat, engine, figures, int(time.time()))
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=CLOSE_SECONDS,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        assert server.started, "all that can be wrong with its address is known before"
        say_where(serving, listener, is_open=api_key is None)
        engine.lead(signals, serving.drain_seconds)
        server.should_exit = True
        thread.join()


def listening(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises `UserError`: it is in use, or not of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"{host}:{port} cannot be listened at ({error.strerror or error}); give another --port or --host"
        ) from error
    return listener


def say_where(serving: Serving, listener: socket.socket, is_open: bool) -> None:
    """Tell people where the model is, once it answers."""
    address, port = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    sys.stdout.write(f"serving {serving.name} at http://{shown}:{port}\n")
    sys.stdout.flush()
    if is_open and not ipaddress.ip_address(address).is_loopback:
        sys.stderr.write(f"anybody who reaches {shown} can ask it: set {API_KEY_VARIABLE} to ask for a key\n")
