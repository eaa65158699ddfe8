"""Checks a checkpoint's folder against its configuration, and reads its tensors one at a time."""

import collections
import dataclasses
import logging
import math
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dsa_jax.config import Config
from dsa_jax.config_hf import read_json
from dsa_jax.hf.complaints import grouped, likely_cause
from dsa_jax.hf.files import BFLOAT16, DTYPES, FLOAT32, FP8, read_headers
from dsa_jax.hf.stacked import Part, Piece
from dsa_jax.hf.table import SCALE_SUFFIX, Entry, leaves
from dsa_jax.quantization import WEIGHT_BLOCK, block_counts, dequantize_blocks
from dsa_jax.strict_json import one_line, shown, shown_path

MAX_TENSORS = 2_000_000  # of a model; DeepSeek-V3.2 has 46,000
COMPARED_BYTES = 1 << 26  # of two tensors at a time

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

logger = logging.getLogger(__name__)


def layer_of(name: str) -> float:
    """Reads a tensor's layer number off its name; the embedding comes before all layers, norm and head after them."""
    match = re.match(r"model\.layers\.([0-9]{1,9})\.", name)
    return int(match[1]) if match else -1 if name.startswith("model.embed") else math.inf


class Checkpoint:
    """A checkpoint's folder, its files checked against its configuration; tensors are read one at a time.

    Making one reads the configuration and every file's header, but no tensor, unless the head is there though it is
    tied to the embedding: then both are compared. Tables of rotary frequencies, such a head, and copies of embedding
    and head in prediction layers are passed over. Three things are no errors but are logged as warnings: layers past
    the last that are left out, prediction layers of which the files hold nothing, and a `deepseek_v3` checkpoint
    without any indexer.

    Args:
      directory: the folder.
      prediction_layers: whether those that `config.json` counts are part of the model.

    Attributes:
      directory: the folder.
      config_json: the contents of its `config.json`.
      config: the same as a `Config`, with as many prediction layers as are taken.
      stored: the tensors that the files hold, by name.
      expected: the table's rows of the tensors that the model needs, by name.
      has_indexer: whether the files hold one.

    Raises:
      ValueError: one line that names all that is missing, unexpected, mis-shaped, of another dtype, or truncated, the
        tensors of a kind together.
    """

    def __init__(self, directory: str | Path, *, prediction_layers: bool = True):
        self.directory = Path(directory)
        self.config_json = read_json(self.directory)
        self.config = Config.from_hf(self.directory)
        if not prediction_layers:
            self.config = dataclasses.replace(self.config, num_nextn_predict_layers=0)
        _check_count(self.config)
        headers = read_headers(self.directory, lambda name: not self._is_past(name) and not _is_derived(name))
        self.stored = headers.stored
        self._leave_out_absent_predictions(self.stored.keys() | headers.unread)
        self.expected = _expected(self.config)
        indexer = {name for name, entry in self.expected.items() if entry.indexer}
        present = indexer & (self.stored.keys() | headers.unread)
        self.has_indexer = self.config_json["model_type"] != "deepseek_v3" or bool(present)
        if not self.has_indexer:
            self.expected = {name: entry for name, entry in self.expected.items() if not entry.indexer}
        missing = self.expected.keys() - self.stored.keys() - headers.unread
        extra = [name for name in self.stored if not self._has_place(name)]
        copies = self.copies()
        unexpected = [name for name in extra if not (self._is_past(name) or _is_derived(name) or name in copies)]
        tied = HEAD in unexpected and self.config.tie_word_embeddings and EMBEDDING in self.stored
        problems = [(name, "is missing") for name in self.expected if name in missing]
        for name in self.expected:
            problems += self._check(name) if name in self.stored else []
        problems += [(name, "is unexpected") for name in unexpected if not (tied and name == HEAD)]
        problems += headers.misplaced
        if tied and not problems and not headers.damaged and not self._same_bytes(HEAD, EMBEDDING):
            problems.append((HEAD, f"differs from {EMBEDDING}, to which tie_word_embeddings = true ties it"))
        if problems or headers.damaged:
            cause = likely_cause(missing, set(unexpected)) if missing else []
            head = f"{shown_path(self.directory)} does not hold the model of its config.json"
            raise ValueError(one_line(head, [*headers.damaged, *cause, *grouped(problems)]))
        self._warn_of_past(headers.skipped.union(extra))
        if not self.has_indexer:
            logger.warning(
                "a dense checkpoint, deepseek_v3 without an indexer: load_hf draws the indexer anew, from its seed"
            )

    @property
    def most_common_dtype(self) -> str:
        """Names the dtype that most parameters have, FP8 counted as bfloat16."""
        return self._counts().most_common(1)[0][0]

    def _counts(self) -> collections.Counter[str]:
        """Counts the parameters of each dtype."""
        counts: collections.Counter[str] = collections.Counter()
        for name in self.expected:
            counts[self.dtype(name).name] += math.prod(self.stored[name].shape)
        return counts

    def is_fp8(self, name: str) -> bool:
        """Tells whether a tensor is stored in FP8."""
        return self.stored[name].dtype == "F8_E4M3"

    def dtype(self, name: str) -> np.dtype:
        """Gives the dtype in which `read` returns a tensor: its own, bfloat16 for FP8."""
        dtype = DTYPES[self.stored[name].dtype]
        return BFLOAT16 if dtype == FP8 else dtype

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor as the file has it; FP8 comes out as bfloat16."""
        stored = self.stored[name]
        if DTYPES[stored.dtype] != FP8:
            return stored.read()
        return np.asarray(_dequantize(stored.read(), self.read_scale(name)))

    def read_scale(self, name: str) -> np.ndarray:
        """Reads the scales of an FP8 weight, in float32."""
        return self.stored[name + SCALE_SUFFIX].read().astype(np.float32)

    def read_part(self, name: str, part: Part) -> Piece:
        """Reads a part of a tensor, given by slices of the parameter's dimensions; FP8 stays FP8, beside its scales."""
        entry, stored = self.expected[name], self.stored[name]
        sizes, part = entry.in_file(entry.shape(self.config)), entry.in_file(part)
        values = stored.read(sizes, part)
        if values.dtype != FP8:
            return Piece(values)
        rows, scale = len(sizes) - (entry.inputs or 1), self.read_scale(name)
        return Piece(values, scale, _blocks(sizes[:rows], part[:rows]), _blocks(sizes[rows:], part[rows:]))

    def read_as_stored(self, name: str, part: Part, *, entry: Entry) -> Piece:
        """Reads a part of a tensor as the file has it; `entry` is its row of the table. Scales come in float32."""
        values = self.stored[name].read(entry.in_file(entry.shape(self.config)), entry.in_file(part))
        return Piece(values.astype(FLOAT32) if entry.scale else values)

    def check_scales(self) -> None:
        """Reads all scales of FP8 weights.

        Raises:
          ValueError: one line that names those that hold NaN or an infinity.
        """
        wrong = [name for name in self.expected if self.is_fp8(name) and not np.isfinite(self.read_scale(name)).all()]
        if wrong:
            problems = grouped((name + SCALE_SUFFIX, "must be finite, got NaN or infinity") for name in wrong)
            raise ValueError(one_line(f"{shown_path(self.directory)} holds scales that are no numbers", problems))

    def copies(self) -> dict[str, str]:
        """Lists the tensors of prediction layers that repeat one of the model, each with the name of that."""
        head = EMBEDDING if self.config.tie_word_embeddings else HEAD
        first, count = self.config.num_hidden_layers, self.config.num_nextn_predict_layers
        parts = {"embed_tokens": EMBEDDING, "shared_head.head": head}
        names = {f"model.layers.{first + i}.{part}.weight": own for i in range(count) for part, own in parts.items()}
        return {name: own for name, own in names.items() if name in self.stored}

    def check_copies(self) -> None:
        """Compares copies of embedding and head with these, and logs which differ: the model's own are used."""
        for name, own in self.copies().items():
            if not self._same_bytes(name, own):
                logger.warning("%s differs from %s, which is used in its place", name, own)

    def check_experts_in_fp8(self) -> None:
        """Checks that the routed experts are stored in FP8.

        Raises:
          ValueError: one line that names those that are not.
        """
        experts = [name for name, entry in self.expected.items() if entry.experts]
        wrong = [(name, f"is {self.stored[name].dtype}") for name in experts if not self.is_fp8(name)]
        if wrong:
            head = f"expert_dtype 'fp8' needs all routed experts in FP8, got {shown_path(self.directory)}"
            way = "`dsa-jax convert --expert-dtype fp8` writes them so"
            raise ValueError(one_line(head, [*grouped(wrong), way]))

    def _check(self, name: str) -> Iterator[tuple[str, str]]:
        """Names what is wrong with a stored tensor."""
        stored, shape = self.stored[name], self.expected[name].file_shape(self.config)
        if stored.shape != shape:
            yield name, f"must have shape {list(shape)}, got {shown(list(stored.shape))}"
            return
        if stored.dtype != "F8_E4M3" or len(shape) != 2:
            if stored.dtype not in ("F32", "BF16"):
                yield name, f"must be F32, BF16 or block-scaled F8_E4M3, got {shown(stored.dtype)[1:-1]}"
            return
        scale, expected = self.stored.get(name + SCALE_SUFFIX), list(block_counts(*shape))
        if scale is None:
            yield name + SCALE_SUFFIX, "is missing, the scales of an F8_E4M3 weight"
        elif list(scale.shape) != expected or scale.dtype not in ("F32", "BF16", "F8_E8M0"):
            yield name + SCALE_SUFFIX, f"must be F32 {expected}, got {scale.dtype[:20]} {shown(list(scale.shape))}"

    def _has_place(self, name: str) -> bool:
        """Tells whether the model needs a stored tensor: it is a parameter, or the scales of one."""
        weight = name.removesuffix(SCALE_SUFFIX)
        return name in self.expected or (weight in self.expected and weight in self.stored and self.is_fp8(weight))

    def _is_past(self, name: str) -> bool:
        """Tells whether a tensor is of a layer past the last, prediction layers that are taken included."""
        last = self.config.num_hidden_layers + self.config.num_nextn_predict_layers
        return last <= layer_of(name) < math.inf

    def _leave_out_absent_predictions(self, names: Collection[str]) -> None:
        """Takes the model to have no prediction layers where the files hold nothing of them, as after transformers."""
        first, count = self.config.num_hidden_layers, self.config.num_nextn_predict_layers
        if count and not any(first <= layer_of(name) < first + count for name in names):
            self.config = dataclasses.replace(self.config, num_nextn_predict_layers=0)
            logger.warning("num_nextn_predict_layers = %d, of which the files hold nothing: taken for 0", count)

    def _same_bytes(self, name: str, other: str) -> bool:
        """Compares two tensors."""
        one, two = self.stored[name], self.stored[other]
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return False
        with open(one.file, "rb") as first, open(two.file, "rb") as second:
            first.seek(one.offset)
            second.seek(two.offset)
            for done in range(0, one.nbytes, COMPARED_BYTES):
                count = min(COMPARED_BYTES, one.nbytes - done)
                if first.read(count) != second.read(count):
                    return False
        return True

    def _warn_of_past(self, names: set[str]) -> None:
        """Logs which layers are left out."""
        past = sorted(int(layer_of(name)) for name in names if self._is_past(name))
        if past:
            where = f"layer {past[0]}" if past[0] == past[-1] else f"layers {past[0]} to {past[-1]}"
            last = self.config.num_hidden_layers
            logger.warning("skipped %d tensors of %s, past num_hidden_layers = %d", len(past), where, last)


def _check_count(config: Config) -> None:
    """Raises ValueError if a model has more tensors than any has."""
    count = sum(len(leaf.layers or (0,)) * (leaf.experts or 1) for leaf in leaves(config))
    if count > MAX_TENSORS:
        raise ValueError(
            f"config.json describes {count:,} tensors, more than {MAX_TENSORS:,}: num_hidden_layers is "
            f"{config.num_hidden_layers:,}, n_routed_experts {config.n_routed_experts:,}"
        )


def _expected(config: Config) -> dict[str, Entry]:
    """Lists the tensors of a model by name."""
    expected: dict[str, Entry] = {}
    for leaf in leaves(config):
        expected |= {name: leaf.entry for _, name in leaf.tensors()}
    return expected


def _is_derived(name: str) -> bool:
    """Tells whether a tensor follows from the configuration: old checkpoints hold their rotary frequencies."""
    return name.endswith("rotary_emb.inv_freq")


def _blocks(sizes: tuple[int, ...], part: Part) -> np.ndarray:
    """Finds the FP8 block of each row, or column, of a part; `sizes` are the dimensions that make up the rows."""
    return np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)[part].reshape(-1) // WEIGHT_BLOCK


@jax.jit
def _dequantize(weight, scale):
    return dequantize_blocks(weight, scale).astype(jnp.bfloat16)
