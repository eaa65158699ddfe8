"""Which code a process runs: versions, and a hash of the sources."""

import hashlib
from pathlib import Path

import jax
import jaxlib.version

import dsa_jax
import train


def code_versions() -> dict[str, str]:
    """Gives the versions of this package, JAX and jaxlib, and the hash of the sources of `dsa_jax` and `train`."""
    return {
        "dsa_jax version": dsa_jax.__version__,
        "hash of the sources": _hash_sources(),
        "jax version": jax.__version__,
        "jaxlib version": jaxlib.version.__version__,
    }


def _hash_sources() -> str:
    """Hashes names and contents of all modules, in an order that no file system decides."""
    digest = hashlib.sha256()
    for folder in (Path(dsa_jax.__file__).parent, Path(train.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
