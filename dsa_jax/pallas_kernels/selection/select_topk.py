"""Exact top-k of long rows of scores: one pass over each row, a buffer of candidates in shared memory.

One block a multiprocessor, of several teams; a team takes one row after another, on its own part of the shared memory
and with its own named barrier, so that the bookkeeping of one team hides behind the loads of the others. (Teams, not
small blocks: the compiler holds the registers down to what a block needs, not to what several need side by side.) What
a row goes through:

1. guess: a sample of the row, spread over all of it, suggests a `floor` which a little more than k scores reach.
2. stream: the row is read once, 16 bytes a load, the next step's loads in flight while this step's scores are
   compared. Scores ≥ `edge` go to the buffer with their positions. The order there is whatever the warps make it: the
   result is a set that (score, position) defines, so it is the same in every run.
3. prune, whenever the buffer is full: the k-th best candidate is narrowed down with histograms of 2048 bins, what
   cannot be among the k best is dropped, and `floor` rises to what is left.
4. Fewer than k candidates after all, because the guess was too high: the row is streamed again without one.
5. prune to k exactly: equal scores by position. Then emit: a bitmap of the row and its prefix sums give each position
   its rank.

Scores are compared as floats while streaming (NaN fails every comparison, -0.0 equals +0.0) and as `keys` in the
histograms: unsigned numbers in the order of the scores. -inf and NaN never reach the buffer.

What limits it: the memory's rate and the bookkeeping of a row. On an H200 with K 2048, 1024 rows of 131072 take
0.181 ms, 3.0 TB/s of the 4.2 of a copy, and 4096 rows of 32768, the same bytes, 0.270 ms. What a team does with a row
is in `select_topk_row`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import simt
from dsa_jax.pallas_kernels.hopper.ptx import MULTIPROCESSORS, SMEM_BYTES, SMEM_GRANULE, SPLAT, WARPGROUP
from dsa_jax.pallas_kernels.selection.topk_row import BINS, CONTROL_WORDS, EDGE_SCORES, VECTOR, WARP, run_team

MAX_THREADS = 1024  # of a block
MAX_SIZE = 1 << 24  # of a row
MAX_K = 8192  # each thread holds its share of the selected positions in registers


@dataclasses.dataclass(frozen=True)
class Config:
    """How rows are dealt out and streamed.

    Attributes:
      threads: of a team.
      teams: of a block; each has its part of the shared memory for its buffer, and a thread 65536 / (threads · teams)
        registers: 64 with 1024 threads.
      vectors: 16-byte loads a thread has in flight, and compares in one step.
      margin: the sample's rank of the floor lies so many standard deviations below the k-th; None guesses no floor.
      blocks: at most so many, one a multiprocessor; what it is changes no result.
    """

    threads: int = 256
    teams: int = 4
    vectors: int = 4
    margin: float | None = 6.0
    blocks: int = MULTIPROCESSORS

    def __post_init__(self):
        if self.threads not in (128, 256, 512):
            raise ValueError(f"threads must be 128, 256 or 512, got {self.threads}")
        if not 1 <= self.teams <= MAX_THREADS // self.threads:
            raise ValueError(f"teams must be 1 to {MAX_THREADS // self.threads} of {self.threads}, got {self.teams}")
        if self.vectors not in (1, 2, 4, 8):
            raise ValueError(f"vectors must be 1, 2, 4 or 8, got {self.vectors}")
        if self.margin is not None and not 0 <= self.margin <= 100:
            raise ValueError(f"margin must be None or within 0 to 100, got {self.margin}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {self.blocks}")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The numbers of one kernel: rows of `size` scores, `k` of each."""

    size: int
    k: int
    config: Config

    @property
    def warp_step(self) -> int:
        """Scores that a warp compares in one step."""
        return WARP * VECTOR * self.config.vectors

    @property
    def step(self) -> int:
        """Scores that the team compares in one step."""
        return self.config.threads * VECTOR * self.config.vectors

    @property
    def smem_words(self) -> int:
        """Shared memory of a team, in words: histogram, scores and positions of the buffer, control words."""
        return (SMEM_BYTES - SMEM_GRANULE) // self.config.teams // 16 * 4

    @property
    def capacity(self) -> int:
        """Candidates that the buffer holds."""
        return (self.smem_words - BINS - CONTROL_WORDS) // 8 * 4

    @property
    def limit(self) -> int:
        """Candidates that streaming may fill: the row's ragged ends come last and find room without a prune."""
        return self.capacity - EDGE_SCORES

    @property
    def target(self) -> int:
        """Candidates that a prune may leave while streaming: a warp's step then finds room, which is progress."""
        return self.k + max(0, self.limit - self.warp_step - self.k) // 4

    @property
    def samples(self) -> int:
        """Scores that the guess looks at."""
        return self.step

    @property
    def shortest_guess(self) -> int:
        """Rows with fewer reachable scores are streamed without a guess."""
        return max(4 * self.samples, self.limit + 1)

    @property
    def bitmap_words(self) -> int:
        """Words a thread of the bitmap with which positions are ranked: power of two; longer rows take several maps."""
        words = 4
        while words < 16 and self.config.threads * words * 32 < self.size:
            words *= 2
        while self._emit_words(words) > self.smem_words - CONTROL_WORDS:
            words //= 2
        return words

    def _emit_words(self, bitmap_words):
        return 2 * self.config.threads * bitmap_words + self.k  # bitmap, prefix sums, the row's result

    @property
    def segment(self) -> int:
        """Positions that one bitmap covers."""
        return 32 * self.config.threads * self.bitmap_words

    def fits(self) -> bool:
        """Whether the buffer can hold what pruning must leave and what emitting needs."""
        fits = self.limit >= self.k + self.warp_step
        return fits and self._emit_words(4) <= self.smem_words - CONTROL_WORDS


def plan(size: int, k: int, config: Config | None = None) -> Plan:
    """The plan for rows of `size` scores: with `config`, or with what was found fastest for this k."""
    if config is not None:
        return Plan(size, k, config)
    default = Plan(size, k, Config())
    return default if default.fits() else Plan(size, k, Config(threads=512, teams=2))


def why_not(scores, k: int, *, start, stop, config: Config | None = None) -> str | None:
    """Says why this kernel cannot take these arguments (anything with shape and dtype), or None if it can."""
    if len(scores.shape) != 3 or scores.dtype != jnp.float32:
        return f"select_topk's kernel needs scores [B, T, S] in float32, got {scores.dtype}{list(scores.shape)}"
    for name, edge in (("start", start), ("stop", stop)):
        if edge.shape != scores.shape[:2] or edge.dtype != jnp.int32:
            return (
                f"select_topk's kernel needs {name} {list(scores.shape[:2])} in int32, "
                f"got {edge.dtype}{list(edge.shape)}"
            )
    if k < 1:
        return f"select_topk's kernel needs k of at least 1, got {k}"
    size = scores.shape[2]
    if size > MAX_SIZE:
        return f"select_topk's kernel takes rows of at most {MAX_SIZE} scores, got {size}"
    if math.prod(scores.shape[:2]) >= 1 << 31:
        return f"select_topk's kernel takes fewer than 2**31 rows, got {math.prod(scores.shape[:2])}"
    if k > MAX_K:
        return f"select_topk's kernel takes k of at most {MAX_K}, got {k}"
    if not plan(size, k, config).fits():
        return f"select_topk's kernel has no shared memory for k = {k} in {config}"
    return None


def select_topk(scores, k: int, *, start, stop, config: Config | None = None):
    """Selects the positions of the k highest scores of each row within [start, stop), exactly.

    Strictly increasing positions, then -1. Of equal scores the lowest position wins, and -0.0 equals +0.0. -inf and NaN
    are never selected, +inf may be; ranges are clamped to the row and may be empty; `k` may exceed S. What lies outside
    a row's range is not read into the result.

    Args:
      scores: [B, T, S] float32.
      k: how many of each row.
      start: [B, T] int32, the first position of each row that may be selected.
      stop: [B, T] int32, the position behind the last.
      config: overrides what was found fastest.

    Returns:
      [B, T, k] int32.
    """
    reason = why_not(scores, k, start=start, stop=stop, config=config)
    if reason:
        raise ValueError(reason)
    batch, length, size = scores.shape
    rows = batch * length
    if rows * size == 0:
        return jnp.full((batch, length, k), -1, jnp.int32)
    p = plan(size, k, config)
    blocks = min(p.config.blocks, -(-rows // p.config.teams))

    def select_topk_kernel(scores_gmem, start_gmem, stop_gmem, out_gmem, smem):
        @plgpu.inline_mgpu(arg_types=(*(plgpu.RefType(),) * 5, SPLAT))
        def run(ctx, scores_gmem, start_gmem, stop_gmem, out_gmem, smem, block):
            run_team(p, rows, blocks, simt.scalar(block), scores_gmem, start_gmem, stop_gmem, out_gmem, smem)

        run(scores_gmem, start_gmem, stop_gmem, out_gmem, smem, lax.axis_index("block"))  # pyright: ignore[reportCallIssue]

    kernel = plgpu.kernel(
        select_topk_kernel,
        out_type=jax.ShapeDtypeStruct((rows, k), jnp.int32),
        scratch_types=(plgpu.SMEM((p.config.teams * p.smem_words,), jnp.int32),),
        num_threads=p.config.teams * p.config.threads // WARPGROUP,
        thread_name="warpgroup",
        grid=(blocks,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mgpu.LoweringSemantics.Lane, reduction_scratch_bytes=0, unsafe_no_auto_barriers=True
        ),
    )
    flat = scores.reshape(rows, size), start.reshape(rows), stop.reshape(rows)
    return kernel(*flat).reshape(batch, length, k)
