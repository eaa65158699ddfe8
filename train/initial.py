"""Where a run's first parameters come from: a Hugging Face folder, another run, or chance."""

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from dsa_jax import Config, Transformer
from dsa_jax.hf.convert import load_hf
from dsa_jax.parallel.sharding import parameter_shardings
from train.checkpoint import load_params
from train.folder import read_model_config
from train.phases import Params, split_groups
from train.state import abstract_params


@dataclasses.dataclass(frozen=True)
class InitialParams:
    """Names a folder with parameters to begin with: Hugging Face's, or a run's (its checkpoint `step`).

    Args:
      folder: has a checkpoint's config.json or a run's run.json.
      step: of a run's checkpoint; without it the newest.
      label: what a run that begins here notes as its origin; without it the folder's absolute path.

    Raises:
      ValueError: if the folder is neither.
    """

    folder: Path
    step: int | None = None
    label: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "folder", Path(self.folder))
        if not self.is_run and not (self.folder / "config.json").is_file():
            raise ValueError(
                f"init must be a folder with a checkpoint's config.json or a run's run.json, got {self.folder}"
            )

    @property
    def is_run(self) -> bool:
        """Says whether it is a run's folder."""
        return (self.folder / "run.json").is_file()

    def config(self, dtype: str) -> Config:
        """Reads the model's configuration, its parameters in float32 as training wants them."""
        if self.is_run:
            return read_model_config(self.folder)
        return dataclasses.replace(Config.from_hf(self.folder), dtype=dtype, param_dtype="float32")

    def params(self, config: Config, *, seed: int = 0, mesh: Mesh | None = None) -> Params:
        """Reads the parameters by group; `seed` draws the indexer of a dense checkpoint, which has none."""
        if self.is_run:
            return load_params(self.folder, abstract_params(config, mesh)[1], step=self.step)
        return split_groups(load_hf(self.folder, dtype=config.dtype, param_dtype="float32", seed=seed, mesh=mesh))[1]

    def __str__(self) -> str:
        return self.label or f"{self.folder.absolute()}"


def random_params(config: Config, *, seed: int, mesh: Mesh | None = None) -> Params:
    """Draws the parameters of a new model, on the mesh if there is one."""
    make = lambda: split_groups(Transformer(config, rngs=nnx.Rngs(seed)))[1]  # noqa: E731
    # It runs once. Optimised on CPU, the tiny model's random bits were seen to take 25 s of compilation, so 2.
    places = None if mesh is None else parameter_shardings(jax.eval_shape(make), mesh)
    return jax.jit(make, out_shardings=places, compiler_options={"xla_backend_optimization_level": 0})()
