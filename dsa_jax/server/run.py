"""Runs a server: from a checkpoint's folder to a listening port, and down again in order."""

import logging
import socket
import time
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from dsa_jax.chat import ChatTemplate
from dsa_jax.chat.commands import load_llm, read_tokenizer
from dsa_jax.chat.template import read_tokenizer_config, token_text
from dsa_jax.server.access import log
from dsa_jax.server.app import make_app
from dsa_jax.server.service import Service
from dsa_jax.server.settings import Settings

LAST_SECONDS = 2  # in which the errors of requests that were ended go out


class Server(uvicorn.Server):
    """Stops in order: the first SIGTERM or SIGINT shuts the door and lets requests end, the second ends them.

    While requests end, new ones are answered with 503, and `/health/ready` tells so.

    Args:
      service: whose requests are waited for.
    """

    def __init__(self, service: Service):
        app, self.admission = make_app(service)
        self.service = service
        self._deadline = float("inf")
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                app, host=settings.host, port=settings.port, access_log=False, server_header=False, log_config=None,
                lifespan="off", timeout_graceful_shutdown=LAST_SECONDS, ws="none",
            )
        )  # fmt: skip

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain, or ends at once when that was begun."""
        if self.admission.draining:
            self._deadline = 0.0
            return
        self.drain()

    def drain(self) -> None:
        """Lets no further request in, and stops when those that are in have ended or the time is over."""
        seconds = self.service.settings.drain_seconds
        log.info("draining: %d requests have %g s to end", self.admission.active, seconds)
        self._deadline = time.monotonic() + seconds
        self.admission.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Tells whether to stop."""
        over = time.monotonic() >= self._deadline
        if over:
            self.service.end_all()
        done = self.admission.draining and (over or not self.admission.active)
        return await super().on_tick(counter) or done


def serve(folder: Path, settings: Settings, *, warm: bool, **options: Any) -> None:
    """Loads a checkpoint and serves it until it is told to stop.

    Args:
      folder: with the checkpoint and its tokenizer.
      settings: of the server.
      warm: whether every step is compiled first.
      **options: of `load_llm`.

    Raises:
      ValueError, OSError: for a checkpoint or an address that cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    service = load(folder, settings, **options)
    if warm:
        log.info("compiling every size of step; --no-warm leaves that to the requests that need them")
        service.engine.warm()
    server = Server(service)
    with listening(settings) as listener:
        log.info("serving %s at http://%s:%d", settings.name, settings.host, listener.getsockname()[1])
        server.run(sockets=[listener])
    service.close()


def load(folder: Path, settings: Settings, **options: Any) -> Service:
    """Makes what a server runs on from a checkpoint's folder.

    Raises:
      ValueError: if it has no tokenizer.
    """
    template = ChatTemplate.of(folder, read_tokenizer(folder))
    engine = load_llm(folder, template.tokenizer, **options).engine
    return Service(engine, template, settings, special=special_tokens(folder))


def listening(settings: Settings) -> socket.socket:
    """Opens the port; raises OSError if that cannot be."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"{settings.host}:{settings.port} cannot be listened at: {error.strerror}") from None


def special_tokens(folder: Path) -> dict[str, str | None]:
    """Reads the names of the special tokens, as `/tokenizer_info` tells them."""
    config = read_tokenizer_config(folder)
    return {name: token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
