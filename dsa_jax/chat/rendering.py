"""Renders a checkpoint's Jinja template, which is not trusted, within bounds on time, memory and length.

The sandbox keeps a template from Python's objects, but not from a loop that never ends or a number of a billion digits,
and no thread can be stopped in the midst of these. So a process of its own renders; it is ended when the time is over.
"""

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from dsa_jax.strict_json import shorten

MAX_CHARACTERS = 50_000_000
MAX_SECONDS = 10.0


class RenderProcess:
    """Asks a process to render, one template at a time; starts it when it is first needed, or after it was ended."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def render(self, source: str, variables: dict[str, Any], *, seconds: float, most: int) -> str:
        """Renders a template.

        Args:
          source: of the template.
          variables: JSON values.
          seconds: after which it is given up.
          most: characters.

        Raises:
          ValueError: if that fails, in one line.
        """
        asked = json.dumps({"source": source, "variables": variables, "most": most}).encode() + b"\n"
        with self._lock:
            try:
                answer = json.loads(self._ask(asked, time.monotonic() + seconds))
            except TimeoutError:
                self._end()
                raise ValueError(f"the conversation's template must end within {seconds:g} s, and did not") from None
            except (OSError, ValueError):
                self._end()
                raise ValueError("the conversation's template must be rendered, but has ended its process") from None
        if "error" in answer:
            raise ValueError(f"the conversation's template has failed: {shorten(answer['error'], 400)}")
        return answer["text"]

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._end()

    def _ask(self, asked: bytes, deadline: float) -> bytes:
        """Sends a line and waits for a line."""
        process = self._running()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(asked)
        process.stdin.flush()
        answer = bytearray()
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            part = os.read(process.stdout.fileno(), 1 << 20)
            if not part:
                raise BrokenPipeError
            answer += part
        return bytes(answer)

    def _running(self) -> subprocess.Popen:
        if self._process is None or self._process.poll() is not None:
            self._end()
            if importlib.util.find_spec("jinja2") is None:
                raise ModuleNotFoundError("templates need Jinja", name="jinja2")
            command = [sys.executable, "-I", str(Path(__file__).with_name("render_process.py"))]
            # Without our environment, which may hold secrets, and in a group of its own, which Ctrl-C does not reach.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={},
                start_new_session=True,
            )  # fmt: skip
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # closes the pipes and waits
                pass


_PROCESS = RenderProcess()
atexit.register(_PROCESS.close)


def render(source: str, variables: dict[str, Any], *, seconds: float = MAX_SECONDS, most: int = MAX_CHARACTERS) -> str:
    """Renders a template in the process that all of this program's templates share; see `RenderProcess.render`."""
    return _PROCESS.render(source, variables, seconds=seconds, most=most)
