"""Writes new entries into the FP8 pages of latents and of index keys on Hopper, both in one kernel and in place.

A thread block has a token. Its warps 0 and 1 hold the 512 latent columns, 8 neighbouring ones a thread, of which 16
threads share a scale; of warp 2 the first 16 threads hold the index key and the next 8 the rotary columns. Launch and
one round trip to memory are all that it takes for the few tokens of a decode step.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsa_jax.pallas_kernels.hopper import ptx, simt
from dsa_jax.pallas_kernels.quantization.rows import THREAD_COLUMNS, hadamard_row, quantize_row, widened

PAGE = 64  # tokens
LATENT = 512  # columns in e4m3
GROUP = 128  # of them share a scale
ROTARY = 64  # columns in bfloat16
KEY = 128  # columns of an index key
SCALES_AT = LATENT  # byte offset in a row of the latents' scales
ROTARY_AT = SCALES_AT + LATENT // GROUP * 4
ROW_BYTES = ROTARY_AT + 2 * ROTARY  # 656
KEY_ROWS = PAGE + PAGE * 4 // KEY  # of an index-key page: the keys, and the bytes of their scales
THREAD_BYTES = 2 * THREAD_COLUMNS  # that a thread reads
LATENT_THREADS, KEY_THREADS, ROTARY_THREADS = LATENT // THREAD_COLUMNS, KEY // THREAD_COLUMNS, ROTARY // THREAD_COLUMNS


def why_not(latent_pages, key_pages, kv, k_index, slots) -> str | None:
    """Says why the kernel cannot take these arguments, or None when it can."""
    pages, tokens = latent_pages.shape[0], kv.shape[0]
    for name, array, shape, dtype in (
        ("latent_pages", latent_pages, (pages, PAGE, ROW_BYTES), jnp.uint8),
        ("key_pages", key_pages, (pages, KEY_ROWS, KEY), jnp.float8_e4m3fn),
        ("kv", kv, (tokens, LATENT + ROTARY), jnp.bfloat16),
        ("k_index", k_index, (tokens, KEY), jnp.bfloat16),
        ("slots", slots, (tokens,), jnp.int32),
    ):
        if array.shape != shape or array.dtype != dtype:
            return f"{name} must be {jnp.dtype(dtype).name} {list(shape)}, got {array.dtype} {list(array.shape)}"
    if not pages or not tokens:
        return f"there must be pages and tokens, got {pages} and {tokens}"
    return None


def write_entries(latent_pages, key_pages, kv, k_index, slots, *, hadamard: bool = True):
    """Rounds new latents and index keys to FP8 and writes them to their slots.

    Each 128 columns of a latent, and an index key, are rounded as `quantize` does; rotary columns are copied. The pages
    are changed in place where the caller has no further use of them: donate them. Of several tokens with one slot any
    may be written, or parts of each.

    Args:
      latent_pages: uint8 [n, 64, 656]: of each token 512 e4m3, 4 float32 scales, 64 bfloat16 rotary.
      key_pages: float8_e4m3fn [n, 66, 128]: 64 keys, and the bytes of their 64 float32 scales.
      kv: bfloat16 [M, 576], 512 latent and 64 rotary columns.
      k_index: bfloat16 [M, 128].
      slots: int32 [M], page · 64 + place in the page; tokens with one outside of [0, 64 · n) are dropped.
      hadamard: whether index keys are to be transformed first, as `hadamard` does, rounded to bfloat16 between.

    Returns:
      latent_pages and key_pages with the new entries.

    Raises:
      ValueError: if `why_not` has a reason.
    """
    reason = why_not(latent_pages, key_pages, kv, k_index, slots)
    if reason is not None:
        raise ValueError(f"write_entries: {reason}")
    size = min(latent_pages.shape[0] * PAGE, (1 << 31) - 1)

    def write_entries_kernel(*refs):
        @ptx.inline_mgpu(arg_types=(*(plgpu.RefType(),) * len(refs), ptx.SPLAT))
        def run(ctx, kv, k_index, slots, latents, keys, token):
            write_token(kv, k_index, slots, latents, keys, simt.scalar(token), size=size, hadamard=hadamard)

        run(*refs, lax.axis_index("token"))

    kernel = ptx.kernel(
        write_entries_kernel,
        grid=(kv.shape[0],),
        grid_names=("token",),
        compiler_params=ptx.compiler_params(),
    )
    # The kernel changes them in place; XLA copies one first where it is needed again.
    latent_ref, key_ref = jax.new_ref(latent_pages), jax.new_ref(key_pages)
    kernel(kv, k_index, slots, latent_ref, key_ref)
    return jax.freeze(latent_ref), jax.freeze(key_ref)


def write_token(kv, k_index, slots, latent_pages, key_pages, token, *, size: int, hadamard: bool):
    """Writes one token's entries, for one thread of its block; slots are below `size`."""
    thread = simt.thread_id()
    slot = simt.load_gmem(simt.gmem_address(slots) + (token << 2).long())
    rotary_thread = thread - (LATENT_THREADS + KEY_THREADS)
    is_rotary = rotary_thread < ROTARY_THREADS  # unsigned: those before wrapped around
    in_kv = simt.where(thread < LATENT_THREADS, thread, rotary_thread + LATENT_THREADS)
    kv_at = simt.gmem_address(kv) + token.long() * (2 * (LATENT + ROTARY)) + (in_kv * THREAD_BYTES).long()
    in_key = thread - LATENT_THREADS
    is_key = in_key < KEY_THREADS
    key_at = simt.gmem_address(k_index) + token.long() * (2 * KEY) + (in_key * THREAD_BYTES).long()
    loads = is_rotary | (thread < LATENT_THREADS + KEY_THREADS)
    words = simt.load4_gmem_if(loads, simt.where(is_key, key_at, kv_at), 0)

    written = slot < size  # unsigned: negative slots are dropped too
    page, place = slot >> 6, slot & (PAGE - 1)
    row = simt.gmem_address(latent_pages) + slot.long() * ROW_BYTES
    key_page = simt.gmem_address(key_pages) + page.long() * (KEY_ROWS * KEY)

    # Whole warps part ways here: rounding exchanges values between lanes, whether or not the slot is there.
    with simt.when(thread < LATENT_THREADS):
        values, scale = quantize_row(widened(words), GROUP)
        with simt.when(written):
            simt.store2_gmem(row + (thread * THREAD_COLUMNS).long(), values)
        group = thread >> 4  # 16 threads hold its 128 columns
        simt.store_gmem_if(written & (thread & 15).equals(0), row + (group << 2).long(), scale.bits(), SCALES_AT)

    with simt.when((thread >> 5).equals(LATENT_THREADS // 32)):
        with simt.when(written & is_rotary):
            simt.store4_gmem(row + (rotary_thread * THREAD_BYTES).long(), words, ROTARY_AT)
        key = widened(words)
        if hadamard:
            key = widened(hadamard_row(key, thread & 15, KEY))
        values, scale = quantize_row(key, KEY)
        with simt.when(written & is_key):
            simt.store2_gmem(key_page + (place * KEY + in_key * THREAD_COLUMNS).long(), values)
        simt.store_gmem_if(written & in_key.equals(0), key_page + (place << 2).long(), scale.bits(), PAGE * KEY)
