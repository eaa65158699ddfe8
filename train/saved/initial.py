"""Where a run's first parameters come from: a Hugging Face folder, another run, or chance."""

import dataclasses
import hashlib
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from dsa_jax import Config, Transformer
from dsa_jax.hf import Checkpoint, load_hf
from dsa_jax.parallel.sharding import parameter_shardings
from train.phases import Params, split_groups
from train.saved.checkpoint import checkpoint_path, load_params
from train.saved.folder import Origin, read_model_config
from train.state import abstract_params

# What a preset may ask for otherwise than the checkpoint has it: no weight depends on it. The sizes of indexers, and
# which layers have one, only where a dense checkpoint has none yet.
FREE_FIELDS = (
    *("index_topk", "index_fp8", "dtype", "rope_theta", "rope_scaling", "max_position_embeddings"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("index_kl_target", "index_share_kl", "baseline", "block_size", "nsa"),
)
INDEXER_SIZES = ("index_n_heads", "index_head_dim", "indexer_types")
SAMPLED_PARTS, SAMPLED_BYTES = 16, 4096  # of each file, for the fingerprint of a checkpoint of any size


@dataclasses.dataclass(frozen=True)
class InitialParams:
    """Names a folder with parameters to begin with: Hugging Face's, or a run's (its checkpoint `step`).

    Args:
      folder: has a checkpoint's config.json or a run's run.json.
      step: of a run's checkpoint; without it the newest.
      label: what a run that begins here notes as its origin; without it the folder's absolute path.
      recorded: the fingerprint that a run has recorded. The folder is then looked into only when the parameters are
        read, since a run that has a checkpoint of its own may do without.

    Raises:
      ValueError: if the folder is neither.
    """

    folder: Path
    step: int | None = None
    label: str | None = None
    recorded: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "folder", Path(self.folder))
        if self.recorded is None:
            self._check()

    def _check(self) -> None:
        if not self.is_there:
            raise ValueError(
                f"init must be a folder with a checkpoint's config.json or a run's run.json, got {self.folder}"
            )

    @property
    def is_run(self) -> bool:
        """Says whether it is a run's folder."""
        return (self.folder / "run.json").is_file()

    @property
    def is_there(self) -> bool:
        """Says whether the folder still holds parameters."""
        return self.is_run or (self.folder / "config.json").is_file()

    @property
    def origin(self) -> Origin:
        """Names the place and what lies there, as a run records it."""
        return Origin(self.label or f"{self.folder.absolute()}", self.recorded or self.fingerprint())

    def fingerprint(self) -> str:
        """Reads sizes and samples of all files of the parameters; the same for a copy of the folder."""
        folder, files = self.folder, [*self.folder.glob("*.safetensors"), *self.folder.glob("*.json")]
        if self.is_run:
            folder = checkpoint_path(self.folder, self.step)
            files = [path for path in (folder / "params").rglob("*") if path.is_file()]
        found = hashlib.blake2b(digest_size=16)
        for path in sorted(files):
            found.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            found.update(_sample(path))
        return found.hexdigest()

    def config(self, dtype: str) -> Config:
        """Reads the model's configuration, its parameters in float32 as training wants them."""
        if self.is_run:
            return read_model_config(self.folder)
        return dataclasses.replace(Checkpoint(self.folder).config, dtype=dtype, param_dtype="float32")

    def free_fields(self) -> tuple[str, ...]:
        """Lists the fields of the model that a run which begins here may have otherwise."""
        if self.is_run or Checkpoint(self.folder).has_indexer:
            return FREE_FIELDS
        return (*FREE_FIELDS, *INDEXER_SIZES)

    def params(self, config: Config, *, seed: int = 0, mesh: Mesh | None = None) -> Params:
        """Reads the parameters by group; `seed` draws the indexer of a dense checkpoint, which has none.

        Raises:
          ValueError: if the folder is not there, what it holds is not what the run has recorded, or of the model and
            the parameters one is of baseline "nsa" and the other is not.
        """
        self._check()
        found = read_model_config(self.folder).baseline if self.is_run else "none"
        if (config.baseline == "nsa") != (found == "nsa"):
            raise ValueError(
                f"baseline 'nsa' has parameters that no other attention has: init of baseline {config.baseline!r} must "
                f"be alike, got {found!r} in {self}"
            )
        if self.recorded is not None and self.recorded != self.fingerprint():
            raise ValueError(f"init must be what the run began with, got other parameters in {self.folder}")
        if self.is_run:
            return load_params(self.folder, abstract_params(config, mesh)[1], step=self.step)
        return split_groups(load_hf(self.folder, config=config, seed=seed, mesh=mesh))[1]

    def __str__(self) -> str:
        return self.label or f"{self.folder.absolute()}"


def _sample(path: Path) -> bytes:
    """Reads a small file, or evenly spread parts of a large one, its first and last bytes among them."""
    size = path.stat().st_size
    if size <= SAMPLED_PARTS * SAMPLED_BYTES:
        return path.read_bytes()
    with path.open("rb") as file:
        parts = []
        for part in range(SAMPLED_PARTS):
            file.seek((size - SAMPLED_BYTES) * part // (SAMPLED_PARTS - 1))
            parts.append(file.read(SAMPLED_BYTES))
    return b"".join(parts)


def random_params(config: Config, *, seed: int, mesh: Mesh | None = None) -> Params:
    """Draws the parameters of a new model, on the mesh if there is one."""
    make = lambda: split_groups(Transformer(config, rngs=nnx.Rngs(seed)))[1]  # noqa: E731
    # It runs once. Optimised on CPU, the tiny model's random bits were seen to take 25 s of compilation, so 2.
    places = None if mesh is None else parameter_shardings(jax.eval_shape(make), mesh)
    return jax.jit(make, out_shardings=places, compiler_options={"xla_backend_optimization_level": 0})()
