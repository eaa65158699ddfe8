"""Pallas kernels for NVIDIA Hopper, one file a kernel, and the choice between them and plain XLA."""

KERNELS: frozenset[str] = frozenset()  # the operations that have a kernel


def choose_implementation(operation: str, implementation: str | None) -> str:
    """Returns "xla" or "pallas" for one operation: `None` leaves the choice, a name insists on it.

    Raises ValueError when the name is neither, or when the operation has no kernel.
    """
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f"implementation must be None, 'xla' or 'pallas', got {implementation!r}")
    if implementation == "pallas" and operation not in KERNELS:
        raise ValueError(f"implementation='pallas': {operation} has no Pallas kernel, use None or 'xla'")
    return implementation or "xla"
