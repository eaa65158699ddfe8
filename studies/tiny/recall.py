"""The recall task: code whose every line ends with a question that earlier lines answer, mixed into text."""

import dataclasses
import itertools
from collections.abc import Sequence

import grain
import numpy as np
from jaxtyping import Bool, Int

from train import data
from train.checks import check_number, shown
from train.data import Batch, BatchIterator, Corpus, DataConfig, SplitName, stream_name, text_row, window_row
from train.evaluation.held_out import HeldOut, draw_batches

REGISTERS = 8  # g
VALUES = 8  # i, for each register: chance at an answer is ln 8
ASK = 128  # byte 128 + g asks for register g
STATE = 192  # byte 192 + 8 g + i states that register g holds i
FAR_BYTES = 64  # an answer counts when its register was last stated more than this far back
DECLARED_PER_LINE = 2
LINE_BYTES = 16  # lines of an episode are cut here, so that a sequence of a few hundred bytes asks often


@dataclasses.dataclass(frozen=True)
class RecallConfig(DataConfig):
    """Says which text to read, and how many of the rows are recall episodes. Bytes are the tokens.

    Raises:
      ValueError: if the share cannot be, or there is a tokenizer.
    """

    recall: float = 0.5
    """The share of sequences that are recall episodes."""

    def __post_init__(self):
        super().__post_init__()
        check_number("recall", self.recall, least=0)
        if self.recall > 1:
            raise ValueError(f"recall must be between 0 and 1, got {shown(self.recall)}")
        if self.pack != "concat":
            raise ValueError(f"recall episodes are mixed with rows that are cut: pack must be concat, got {self.pack}")
        if self.tokenizer is not None:
            raise ValueError(f"recall episodes are made of bytes: tokenizer must be None, got {self.tokenizer}")


@dataclasses.dataclass(frozen=True)
class RecallCorpus:
    """Gives batches of text of which `share` of the rows are recall episodes, evenly spread; a `BatchSource`.

    Episodes are written over lines of the same split.

    Examples:
      >>> corpus = load(RecallConfig())
      >>> batch = next(corpus.batches("train", batch_size=4, seq_len=512, seed=0))
    """

    text: Corpus
    share: float

    @property
    def fingerprint(self) -> str:
        """Names the text and the share of episodes."""
        return f"{self.text.fingerprint} {self.share}"

    def batches(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> BatchIterator[Batch]:
        """Begins an endless iterator over `dataset(...)`, whose position can be saved."""
        dataset = self.dataset(split, batch_size=batch_size, seq_len=seq_len, seed=seed)
        name = stream_name(self.text.fingerprint, split, batch_size, seq_len, seed, self.share)
        return BatchIterator(dataset, name)

    def dataset(self, split: SplitName, *, batch_size: int, seq_len: int, seed: int) -> grain.MapDataset[Batch]:
        """Makes endless batches in random access, as `Corpus.dataset`."""
        documents = self.text.documents(split)

        def row(index: int, window: int) -> Batch:
            if int((index + 1) * self.share) > int(index * self.share):
                rng = np.random.default_rng((seed, index))
                return recall_row(documents.read(0, documents.size), window * seq_len, seq_len, rng)
            return text_row(documents, window * seq_len, seq_len)

        windows = self.text.windows(split, batch_size=batch_size, seq_len=seq_len, seed=seed)
        return windows.map_with_index(row).batch(batch_size, batch_fn=Batch.stack)


def load(config: RecallConfig, *, vocab_size: int = 256) -> RecallCorpus:
    """Reads the text and mixes episodes into it; see `train.data.load`."""
    return RecallCorpus(data.load(config, vocab_size=vocab_size), config.recall)


def draw_held_out(corpus: RecallCorpus, batches: int, batch_size: int, seq_len: int, *, seed: int = 0) -> HeldOut:
    """Draws held-out text and held-out episodes, whose scored answers are a part of their own, and mixes them."""
    shares = {"text": 1 - corpus.share, "recall": corpus.share}
    sources = {"text": dataclasses.replace(corpus, share=0.0), "recall": dataclasses.replace(corpus, share=1.0)}
    parts = {
        part: draw_batches(corpus.text, batches, batch_size, seq_len, seed=seed, source=sources[part])
        for part, share in shares.items()
        if share > 0
    }
    answers = {"answers": tuple(scored_answers(batch) for batch in parts.get("recall", ()))}
    return HeldOut(parts, {"recall": answers} if "recall" in parts else {}, {part: shares[part] for part in parts})


def recall_row(text: np.ndarray, begin: int, seq_len: int, rng: np.random.Generator) -> Batch:
    """Makes a row of one episode, a single document over the lines of text that follow `begin`."""
    lines = _lines(np.take(text, np.arange(begin, begin + 4 * seq_len), mode="wrap"))
    return window_row(recall_episode(lines, seq_len + 1, rng), np.zeros(seq_len + 1, np.int32))


def recall_episode(lines: Sequence[bytes], length: int, rng: np.random.Generator) -> Int[np.ndarray, " L"]:
    """Writes an episode: code whose every line ends with a question that earlier lines answer.

    The first lines begin with statements, bytes 192 + 8 g + i, each of which gives register g its value i for good.
    Every line ends with the question 128 + g for a register stated before, and its statement again as the answer.

    Args:
      lines: the code, ASCII: bytes from 128 up are the task's own.
      length: bytes of the episode.
      rng: draws values and questions.
    """
    values = STATE + VALUES * np.arange(REGISTERS) + rng.integers(VALUES, size=REGISTERS)
    order = rng.permutation(REGISTERS)
    episode, declared = bytearray(), 0
    code = itertools.cycle(lines or [b""])
    while len(episode) < length:
        new = order[declared : declared + DECLARED_PER_LINE]
        declared += len(new)
        episode += bytes(values[new].tolist()) + next(code)
        register = order[rng.integers(declared)]
        episode += bytes((ASK + register, values[register], ord("\n")))
    return np.frombuffer(bytes(episode[:length]), np.uint8).astype(np.int32)


def scored_answers(batch: Batch) -> Bool[np.ndarray, "B T"]:
    """Finds the targets that are scored answers, in rows of episodes.

    An answer follows a question. It is scored if the last statement of its register lies more than 64 bytes back.
    """
    tokens = np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)
    scored = np.zeros(tokens.shape, bool)
    for row, bytes_ in enumerate(tokens.tolist()):
        last: dict[int, int] = {}
        for place, byte in enumerate(bytes_):
            if byte < STATE:
                continue
            register = (byte - STATE) // VALUES
            is_answer = place > 0 and ASK <= bytes_[place - 1] < ASK + REGISTERS
            scored[row, place] = is_answer and place - last[register] > FAR_BYTES
            last[register] = place
    return scored[:, 1:]


def _lines(text: np.ndarray) -> list[bytes]:
    """Takes the lines of code in bytes, without blank ones, indentation and bytes from 128 up, which the task uses."""
    ascii_text = text[text < 128].astype(np.uint8).tobytes()
    stripped = (line.strip()[:LINE_BYTES] for line in ascii_text.split(b"\n"))
    return [line for line in stripped if line]
