"""Runs the pipeline that all kernels of grouped products are made of: one warpgroup copies, two multiply.

Operands come by TMA into a ring of stages, each with 64 of the inner dimension. A compute warpgroup starts the products
of a stage while those of the stage before still run, and frees a stage when its products are done.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx
from dsa_jax.pallas_kernels.hopper.constants import SWIZZLED_COLUMNS, WGMMA_ROWS

BLOCK_ROWS = WGMMA_ROWS  # of one product of a warpgroup
DEPTH = SWIZZLED_COLUMNS  # of the inner dimension in a stage
COMPUTE_WARPGROUPS = 2
SUM_COLUMNS = 256  # of a compute warpgroup's products [64, …] together, at most
COMPUTE_REGISTERS = 232  # of a thread: 128 hold the sums
COPY_REGISTERS = ptx.registers_left(COMPUTE_REGISTERS)


def ring(stages: int, a_tile: tuple[int, ...], b_tile: tuple[int, ...], copies: int, b_dtype=jnp.bfloat16) -> dict:
    """Gives the shared memory of a ring of stages of two operands, and its barriers.

    Args:
      stages: how many there are.
      a_tile: shape of the left operand of a stage.
      b_tile: shape of the right one.
      copies: how many copies bring a stage.
      b_dtype: of the right operand.
    """
    return dict(
        a_smem=plgpu.SMEM((stages, *a_tile), jnp.bfloat16, transforms=ptx.swizzled(jnp.bfloat16)),
        b_smem=plgpu.SMEM((stages, *b_tile), b_dtype, transforms=ptx.swizzled(b_dtype)),
        # A stage has landed: an arrival of each copy. Both compute warpgroups wait.
        full=plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        # A stage may be refilled: an arrival of each compute warpgroup, at first and when it is done with it.
        empty=plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
    )


def run(
    for_each_item: Callable,
    *,
    copy: Callable,
    operands: Callable,
    finish: Callable,
    products: int,
    columns: int,
    has_products: Callable | None = None,
    load: Callable | None = None,
    prepare: Callable | None = None,
    extra: int = 0,
    full,
    empty,
    interpret: bool,
) -> None:
    """Runs one thread block.

    Args:
      for_each_item: `for_each_item(work)` calls `work(item, before, steps)` for every item of this thread block, which
        has products of `steps` stages, behind `before` stages of all items ahead of it.
      copy: `copy(item, step, stage, full)` starts the copies of a stage.
      operands: `operands(item, warpgroup, step, stage, i)` gives the operands of product i.
      finish: `finish(item, warpgroup, sums, take)` takes the sums, and the extra stages by `take(i, read)`, each once.
      products: how many products [64, columns] a compute warpgroup has.
      columns: of a product.
      has_products: `has_products(item, warpgroup)` says whether a warpgroup has them, or only lets stages pass; None if
        it always has.
      load: `load(item, step)` loads values that `prepare` wants, one step ahead.
      prepare: `prepare(values, warpgroup, step, stage)` makes an operand ready of a stage that has landed; products of
        the step before may still read theirs.
      extra: how many stages follow those of an item's products, with what `finish` reads.
      full: barriers of the stages.
      empty: barriers of the stages.
      interpret: whether the interpreter runs this.
    """
    warpgroup, stages = lax.axis_index("warpgroup"), full.shape[0]

    @pl.when(warpgroup == COMPUTE_WARPGROUPS)
    def _():
        if not interpret:
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

        def bring(item, before, steps):
            @pl.loop(0, steps + extra)
            def _(step):
                stage = lax.rem(before + step, stages)
                plgpu.barrier_wait(empty.at[stage])
                copy(item, step, stage, full.at[stage])

        for_each_item(bring)
        if interpret:  # which insists that every phase of a barrier is waited for
            for stage in range(stages):
                plgpu.barrier_wait(empty.at[stage])

    @pl.when(warpgroup < COMPUTE_WARPGROUPS)
    def _():
        if not interpret:
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        for stage in range(stages):
            plgpu.barrier_arrive(empty.at[stage])

        def free(position):
            plgpu.barrier_arrive(empty.at[lax.rem(position, stages)])

        def multiply(item, before, steps):
            def sums_of(*sums):
                def add(step, values):
                    stage = lax.rem(before + step, stages)
                    following = load(item, jnp.minimum(step + 1, steps - 1)) if load else ()
                    plgpu.barrier_wait(full.at[stage])
                    if prepare:
                        prepare(values, warpgroup, step, stage)
                    for i, ref in enumerate(sums):
                        plgpu.wgmma(ref, *operands(item, warpgroup, step, stage, i))
                    plgpu.wgmma_wait(products)  # those of the stage before are done
                    pl.when(step > 0)(lambda: free(before + step - 1))
                    return following

                lax.fori_loop(0, steps, add, load(item, 0) if load else ())
                results = [ref[...] for ref in sums]
                pl.when(steps > 0)(lambda: free(before + steps - 1))
                return results

            def take(i, read):
                stage = lax.rem(before + steps + i, stages)
                plgpu.barrier_wait(full.at[stage])
                values = read(stage)
                free(before + steps + i)
                return values

            accumulators = [ptx.ACC((BLOCK_ROWS, columns), jnp.float32)] * products
            finish(item, warpgroup, pl.run_scoped(sums_of, *accumulators), take)

        def pass_by(before, steps):
            @pl.loop(0, steps + extra)
            def _(step):
                plgpu.barrier_wait(full.at[lax.rem(before + step, stages)])
                free(before + step)

        def compute(item, before, steps):
            if has_products is None:
                multiply(item, before, steps)
                return
            has = has_products(item, warpgroup)
            pl.when(has)(functools.partial(multiply, item, before, steps))
            pl.when(jnp.logical_not(has))(functools.partial(pass_by, before, steps))

        for_each_item(compute)
        plgpu.wait_smem_to_gmem(0)
