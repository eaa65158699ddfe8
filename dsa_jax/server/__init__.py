"""A server for the clients of OpenAI's interface, on FastAPI and uvicorn: `python -m dsa_jax serve FOLDER`."""

from dsa_jax.server.run import Server, load, serve
from dsa_jax.server.service import Service
from dsa_jax.server.settings import Settings, read_keys

__all__ = ["Server", "Service", "Settings", "load", "read_keys", "serve"]
