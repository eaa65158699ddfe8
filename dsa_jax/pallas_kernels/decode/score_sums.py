"""Sums and stores the index scores of a tile of 64 keys and of one to four queries, from the products of a wgmma.

In wgmma's layout a thread holds of each tile two rows (keys r and r + 8 of its warp's 16) and in each 2 neighbouring
columns in every 8, so four neighbouring lanes hold a row. A column is a head of a query. A thread sums its columns, one
sum for each query and row; then the four lanes add theirs up in two steps, each handing over half of its sums where it
has more than one. The order of the additions is that of `index_scores/forward.py`, for any number of queries, so a key
scores the same bits in prefill and decode.

Of lane l = 2a + b of the four, a and b 0 or 1, are at last: one query, key r + 8a, in both lanes; two queries, key
r + 8b of query a; four queries, both keys of query l.
"""

from jaxlib.mlir.dialects import llvm

from dsa_jax.pallas_kernels.hopper import floats, ptx, simt

NO_QUERY = 0xFFFFFFFF  # stands for the number of keys of a query that is not there: its scores are not stored


def pairs_of(array):
    """Lists the pairs of neighbouring columns that a thread holds of an array in registers, row by row of pairs."""
    halves = (ptx.i32(0), ptx.i32(1))
    return [[simt.Reg(llvm.extractelement(pair, half)) for half in halves] for pair in array.registers.ravel()]


def lane_query(queries: int):
    """Numbers the query whose scores this thread stores, of those of its warpgroup."""
    lane = simt.thread_id() & 3
    return {1: lambda: lane & 0, 2: lambda: lane >> 1, 4: lambda: lane}[queries]()


def lane_range(start_gmem, stop_gmem, row, left, size: int, queries: int):
    """Loads the first key, and the number of keys, of the query whose scores this thread stores.

    Args:
      start_gmem: int32 [B · T], the first key of each query.
      stop_gmem: int32 [B · T], the end of its keys.
      row: of them, that of the warpgroup's first query.
      left: how many queries there are from that one on; NO_QUERY keys for one behind.
      size: to which ranges are clamped.
      queries: of the warpgroup.
    """
    query = lane_query(queries)
    there = query < left
    at = (simt.where(there, row + query, 0) << 2).long()
    low, high = (simt.clamped(simt.load_gmem(simt.gmem_address(ref) + at), size) for ref in (start_gmem, stop_gmem))
    return low, simt.where(there, simt.where(low < high, high - low, 0), NO_QUERY)


def lane_sums(products, weights, queries: int):
    """Sums w · relu(x) over the heads of each query: those of this lane, one or two.

    Args:
      products: pairs of float32, of 8 columns after the other first the upper row's, then the lower row's.
      weights: pairs of float32, of 8 columns after the other.
      queries: whose columns they are: 1, 2 or 4.
    """
    per_query = len(weights) // queries

    def part(number):
        """Sums this thread's columns of one query and row: number 2 · query + half."""
        query, half = divmod(number, 2)
        total = simt.f32(0.0)  # and not a first product: a sum of -0.0 is +0.0
        for column in range(query * per_query, (query + 1) * per_query):
            for x, w in zip(products[2 * column + half], weights[column], strict=True):
                total = floats.multiply_add(floats.relu(x), w, total)
        return total

    sums = [part(number) for number in range(2 * queries)]
    for bit in (2, 1):  # of the lane: the one without it keeps the first half
        sums = _exchanged(sums, bit)
    return sums


def _exchanged(sums, bit):
    """Adds up the sums of two lanes whose numbers differ in a bit; each keeps half of them, or both the only one."""
    if len(sums) == 1:
        return [floats.add(sums[0], floats.from_lane(sums[0], bit))]
    upper = (simt.thread_id() & bit) > 0
    half = len(sums) // 2
    out = []
    for low, high in zip(sums[:half], sums[half:], strict=True):
        kept, given = simt.where(upper, high, low), simt.where(upper, low, high)
        out.append(floats.add(kept, floats.from_lane(given, bit)))  # one shuffle for two sums
    return out


def store_tile(sums, scale, low, count, out_gmem, row, key, size: int, queries: int):
    """Stores this thread's sums times the scales of their keys, -inf for keys out of its query's range.

    Args:
      sums: from `lane_sums`.
      scale: address in shared memory of the scales of the tile's 64 keys, or None.
      low: from `lane_range`.
      count: from `lane_range`.
      out_gmem: float32 [B · T, size].
      row: of `out_gmem`, that of the warpgroup's first query.
      key: the tile's first key.
      size: a multiple of 64. A tile behind it is not stored.
      queries: of the warpgroup.
    """
    thread = simt.thread_id() & 127
    tile_row = ((thread >> 5) << 4) + ((thread >> 2) & 7)
    stores = (count < 1 << 31) & (key < size)
    if queries == 1:  # two lanes have the same sum
        tile_row = tile_row + ((thread & 2) << 2)
        stores = stores & (thread & 1).equals(0)
    elif queries == 2:
        tile_row = tile_row + ((thread & 1) << 3)
    position = key + tile_row
    address = simt.gmem_address(out_gmem) + (row + lane_query(queries)).long() * (4 * size) + (position << 2).long()
    for i, score in enumerate(sums):
        if scale is not None:
            score = floats.multiply(score, simt.load(scale + (tile_row << 2), 8 * 4 * i).float())
        # Unsigned: a key before the first wraps around to a large number.
        reached = (position + 8 * i - low) < count
        score = simt.where(reached, score, float("-inf")).bits()
        simt.store_gmem_if(stores, address, score, 8 * 4 * i)
