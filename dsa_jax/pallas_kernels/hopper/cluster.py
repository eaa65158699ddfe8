"""Writes what the thread blocks of a cluster do together, in the vocabulary of `simt`.

The blocks of a cluster run at the same time on neighbouring multiprocessors, and each may read the shared memory of the
others: 17 cycles for 128 bytes, measured on an H200, so read little. `tests/numpy_cluster.py` has the same words.
"""

from dsa_jax.pallas_kernels.hopper.simt import asm


def barrier():
    """Waits until all threads of the cluster have come; what they wrote to shared memory is visible behind it."""
    arrive()
    wait()


def arrive():
    """Says that this thread has come to the cluster's barrier, and goes on: `wait` must follow."""
    asm("barrier.cluster.arrive.release.aligned;", convergent=True)


def wait():
    """Waits until all threads of the cluster have called `arrive`."""
    asm("barrier.cluster.wait.acquire.aligned;", convergent=True)


def load_from(rank, address, offset=0):
    """Loads an int32 from the shared memory of block `rank` of the cluster, an int, at this block's `address`."""
    text = f"{{.reg .b32 a; mapa.shared::cluster.u32 a, $1, {rank}; ld.shared::cluster.b32 $0, [a+{offset}];}}"
    return asm(text, address, results="r")
