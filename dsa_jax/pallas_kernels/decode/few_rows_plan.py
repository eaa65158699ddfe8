"""Sets how `select_few_rows` shares rows among thread blocks, and budgets the shared memory of each."""

import dataclasses

BINS = 256  # of a histogram, a word each
WORD = 32  # positions of a word of a bitmap
VECTOR = 4  # scores of a 16-byte load
MAX_VECTORS = 8  # of a thread, held in registers


@dataclasses.dataclass(frozen=True)
class Config:
    """Sets how a row is shared; no result depends on it.

    Attributes:
      blocks: of a cluster; 8 is the most that every Hopper GPU runs.
      threads: of a block.
    """

    blocks: int = 8
    threads: int = 512

    def __post_init__(self):
        if self.blocks not in (1, 2, 4, 8):
            raise ValueError(f"blocks must be 1, 2, 4 or 8, got {self.blocks}")
        if self.threads not in (256, 512, 1024):
            raise ValueError(f"threads must be 256, 512 or 1024, got {self.threads}")


def default_config(rows: int, size: int) -> Config:
    """Chooses the configuration that was found fastest on an H200, for the top 2048, mostly of 131072.

    One row: 10.6 µs in 8 blocks of 512 threads. 16 rows: 16.2 in 4 of 1024, 20.2 in 8 of 512, whose clusters do not all
    fit at once. 32 rows: 29.8 in 4 of 1024 and 30.2 in 2, which take 10.9 instead of 17.4 for rows of 4096. 64 rows:
    33.4 in 2 of 1024. 128 rows: 65.0 in one of 1024 and 60.3 in 2, which take 20.6 instead of 12.3 for rows of 4096.
    """
    if rows <= 8 or size > 1 << 20:
        return Config()
    if rows <= 16:
        return Config(blocks=4, threads=1024)
    # The bitmaps of more than 2^19 scores do not fit into one block's shared memory.
    return Config(blocks=2 if rows <= 64 or size > 1 << 19 else 1, threads=1024)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Budgets the shared memory of one kernel: rows of `size` scores, of which `k` are selected.

    Attributes:
      size: positions of a row, a multiple of 4.
      k: how many are selected.
      queries: rows that share a row of the table.
      pages: of a row of the table, or 0 without one: positions then come out as they are.
      config: tuning.
    """

    size: int
    k: int
    queries: int = 1
    pages: int = 0
    config: Config = Config()

    @property
    def vectors(self) -> int:
        """Vectors that a thread holds in registers."""
        return min(MAX_VECTORS, -(-self.share // (VECTOR * self.config.threads)))

    @property
    def in_registers(self) -> int:
        """Scores of a row that a block holds in registers."""
        return VECTOR * self.vectors * self.config.threads

    @property
    def share(self) -> int:
        """Scores of a row that a block has at most, in whole words of the bitmaps."""
        return -(-self.size // (WORD * self.config.blocks)) * WORD

    @property
    def words(self) -> int:
        """Words of a bitmap."""
        return self.share // WORD

    @property
    def thread_words(self) -> int:
        """Neighbouring words of a bitmap that one thread writes the positions of."""
        return -(-self.words // self.config.threads)

    @property
    def samples(self) -> int:
        """Scores that the guess looks at."""
        return VECTOR * self.config.threads

    @property
    def above_at(self) -> int:
        """Byte offset of the bitmap of keys above the k-th, behind four histograms, two of the guess and two of all."""
        return 4 * 4 * BINS

    @property
    def equal_at(self) -> int:
        """Byte offset of the bitmap of keys equal to the k-th."""
        return self.above_at + 4 * self.words

    @property
    def zeroed(self) -> int:
        """Bytes that are zero at first."""
        return -(-(self.equal_at + 4 * self.words) // 16) * 16

    @property
    def sums_at(self) -> int:
        """Byte offset of the warps' sums (32 words), of their second sums (32 words), and of 8 control words."""
        return self.zeroed

    @property
    def found_at(self) -> int:
        """Byte offset of the control words: a bin, what is above it and in it; need; this block's two counts."""
        return self.sums_at + 256

    @property
    def smem_words(self) -> int:
        """Words of 4 bytes of a block's shared memory."""
        return (self.found_at + 32) // 4
