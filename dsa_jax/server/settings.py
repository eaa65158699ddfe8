"""Settings of a server: where it listens, who may ask, and how much."""

import dataclasses
import ipaddress
import stat
from pathlib import Path

from dsa_jax.strict_json import shown_path

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Settings:
    """Bounds what clients can ask for.

    Attributes:
      name: of the model, as clients give it.
      host: the address to listen at; without keys it must be a loopback one.
      port: 0 takes a free one.
      keys: of clients; none lets everybody in who reaches the address.
      origins: of pages of other sites that may ask, such as `https://chat.example.org`.
      hosts: names besides `localhost` by which clients may call this server; addresses are always right.
      max_body: bytes of a request's body.
      max_requests: requests at a time, from the first byte of a body to the last of its answer.
      max_sequences: continuations at a time, of all requests, running or queued.
      max_output: tokens that one request may ask for: prompts × n × max_tokens.
      body_seconds: in which a body must have come.
      send_seconds: after which a client that does not read is left.
      drain_seconds: for requests to end in, after SIGTERM.
    """

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_body: int = 8 * MIB
    max_requests: int = 512
    max_sequences: int = 1024
    max_output: int = 2**18
    body_seconds: float = 60.0
    send_seconds: float = 30.0
    drain_seconds: float = 30.0

    def __post_init__(self):
        for name in ("max_body", "max_requests", "max_sequences", "max_output", "body_seconds", "send_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not self.drain_seconds >= 0:
            raise ValueError(f"drain_seconds must be at least 0, got {self.drain_seconds}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be from 0 to 65535, got {self.port}")
        for origin in self.origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ValueError(f"allowed origins must be like https://chat.example.org, got {origin!r}")
        if not self.keys and not is_loopback(self.host):
            raise ValueError(
                f"host must be a loopback address where no API keys are given, got {self.host}: "
                "with --api-key-file others can be let in"
            )


def is_loopback(host: str) -> bool:
    """Tells whether only this machine reaches an address; a name other than `localhost` may mean any."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> tuple[str, ...]:
    """Reads API keys, one a line, from a file that nobody but its owner can read.

    Raises:
      ValueError: if others can read it, or it holds no key or something that is none; no key is shown.
      OSError: if it cannot be read.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"{shown_path(path)} must be its owner's alone (chmod 600), got mode {mode:04o}")
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{shown_path(path)} must hold keys of visible ASCII characters, got others") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    for number, line in enumerate(lines, 1):
        if not line.isprintable() or " " in line.strip():
            raise ValueError(f"{shown_path(path)}, line {number}: must hold one key of visible characters, got others")
    if not keys:
        raise ValueError(f"{shown_path(path)} must hold an API key a line, got none")
    return keys
