"""The recipes of post-training: one for two CPU cores, one for a GPU, one for a model of one's own."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsa_jax import Config
from train.checks import shown
from train.files import read_json_file
from train.optimizer import OptimizerSettings
from train.phases import BASE, DISTILL, MIXED, ON_POLICY, SPARSE, SPECIALIST, WARMUP, Phase
from train.post.environment import Task
from train.post.policy import PolicySettings
from train.post.stages import DENSE, FREE, PostConfig, PostStage
from train.settings import PhaseSettings, Stage, as_json


@dataclasses.dataclass(frozen=True)
class Preset:
    """Names a recipe and the tasks that it is for; without tasks they are the user's."""

    config: Callable[[], PostConfig]
    tasks: Callable[[], dict[str, Task]] = dict


def _adamw(rate: float, **others: Any) -> OptimizerSettings:
    return OptimizerSettings(learning_rate=rate, weight_decay=0.0, **others)


def _policy_stage(
    name: str,
    phase: Phase,
    begins: str,
    shape: Stage,
    policy: PolicySettings,
    *,
    rate: float,
    tasks: tuple[str, ...] = (),
) -> PostStage:
    """Makes a stage of reinforcement learning with a constant rate, the indexer's the same; routers' biases stay."""
    indexer = None if policy.freeze_indexer else _adamw(rate)
    settings = PhaseSettings(phase, (shape,), backbone=_adamw(rate), indexer=indexer)
    return PostStage(name, (settings,), begins=begins, tasks=tasks, policy=policy)


# On two CPU cores

TINY_TOKENS, TINY_K = 96, 16
TINY_TASKS = ("arithmetic", "search")
TINY_ROWS = Stage(30, 96, TINY_TOKENS)
TINY_POLICY = PolicySettings(8, max_completion_length=64, off_policy_mask_threshold=0.5, rollout_rows=96)
UNPENALISED = f"arithmetic{FREE}"


def tiny_model() -> Config:
    """Makes a model of two layers, the second of experts, that selects 16 of at most 96 keys."""
    sizes: dict[str, Any] = dict(num_hidden_layers=2, first_k_dense_replace=1, index_topk=TINY_K, index_n_heads=8)
    experts: dict[str, Any] = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
    return Config.tiny(**sizes, **experts, moe_intermediate_size=192, max_position_embeddings=128)


def tiny() -> PostConfig:
    """Makes the recipe of `make post`: a cold start, two specialists, distillation, a mix."""
    policy = TINY_POLICY
    matrices = _adamw(4e-3, muon_learning_rate=0.02, schedule="cosine")
    cosine = _adamw(1e-3, schedule="cosine")
    cold = (
        PhaseSettings(BASE, (Stage(600, 40, TINY_TOKENS),), backbone=matrices, bias_rate=1e-2),
        PhaseSettings(WARMUP, (Stage(40, 32, TINY_TOKENS),), indexer=_adamw(1e-2)),
        PhaseSettings(
            SPARSE, (Stage(25, 32, TINY_TOKENS),), backbone=_adamw(5e-4), indexer=_adamw(2e-3), bias_rate=1e-3
        ),
    )
    learnt = PhaseSettings(DISTILL, (Stage(24, 32, TINY_TOKENS),), backbone=cosine, indexer=cosine, bias_rate=1e-3)
    rows, names = TINY_ROWS, TINY_TASKS
    return PostConfig(
        model=tiny_model(),
        stages=(
            PostStage("cold-start", cold, tasks=names),
            _policy_stage("arithmetic", SPECIALIST, "cold-start", rows, policy, tasks=names[:1], rate=5e-4),
            _policy_stage("search", SPECIALIST, "cold-start", rows, policy, tasks=names[1:], rate=1e-3),
            PostStage("distilled", (learnt,), begins="cold-start", tasks=names, samples_of=names, samples=192),
            _policy_stage("mixed", MIXED, "distilled", rows, policy, tasks=names, rate=5e-4),
        ),
        evaluation_prompts=192,
        checkpoint_every=10,
    )


def controls() -> PostConfig:
    """Makes `tiny` and what it is compared with: dense attention, no length penalty, on-policy distillation."""
    dense = dataclasses.replace(TINY_POLICY, attention="dense", freeze_indexer=True)
    free = (UNPENALISED,)
    others = (
        _policy_stage(f"search{DENSE}", SPECIALIST, "cold-start", TINY_ROWS, dense, tasks=("search",), rate=1e-3),
        _policy_stage(UNPENALISED, SPECIALIST, "cold-start", TINY_ROWS, TINY_POLICY, tasks=free, rate=5e-4),
        _on_policy_stage("on-policy", "cold-start", TINY_ROWS, TINY_POLICY, rate=5e-4, teachers=TINY_TASKS),
    )
    return dataclasses.replace(made := tiny(), stages=(*made.stages, *others))


def tiny_tasks() -> dict[str, Task]:
    """Makes the tasks of `tiny`."""
    from train.post.environments import make_tasks

    return {task.name: task for task in make_tasks("tiny", TINY_TASKS)}


def controls_tasks() -> dict[str, Task]:
    """Makes the tasks of `controls`: those of `tiny`, and arithmetic whose reward does not count tokens."""
    from train.post.environments import make_tasks

    (free,) = make_tasks("tiny", ("arithmetic",), penalty=False)
    return tiny_tasks() | {UNPENALISED: dataclasses.replace(free, name=UNPENALISED)}


# On one GPU: sizes chosen for at most 30 minutes of an H200 a seed, in pieces by --stop-after and --resume

GPU_LENGTHS = {"arithmetic": 512, "programs": 768, "logic": 512, "coding": 1024, "search": 4096}  # tokens of a row
GPU_LONGEST = max(GPU_LENGTHS.values())


def gpu_model() -> Config:
    """Makes a model of four layers, three of experts, that selects 256 of at most 4096 keys."""
    return Config(
        vocab_size=256,
        hidden_size=512,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=16,
        q_lora_rank=256,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        index_n_heads=16,
        index_head_dim=128,
        index_topk=256,
        intermediate_size=1536,
        moe_intermediate_size=256,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        rope_scaling=None,
        max_position_embeddings=GPU_LONGEST,
        initializer_range=512**-0.5,
        dtype="bfloat16",
    )


def post() -> PostConfig:
    """Makes the recipe for one GPU: five specialists, distillation and a mix, and on-policy distillation beside it.

    In bfloat16 the engine and training choose other experts and keys here and there, so both are replayed.
    """
    names = tuple(GPU_LENGTHS)
    policy = PolicySettings(
        num_generations=8,
        max_completion_length=GPU_LONGEST - 256,
        off_policy_mask_threshold=0.5,
        replay=("routes", "selections"),
        rollout_rows=128,
    )
    matrices = _adamw(2e-3, muon_learning_rate=0.02, schedule="cosine", warmup_steps=20)
    cosine = _adamw(5e-4, schedule="cosine")
    cold = (
        PhaseSettings(BASE, (Stage(1200, 64, 1024), Stage(200, 16, GPU_LONGEST)), backbone=matrices, bias_rate=1e-2),
        PhaseSettings(WARMUP, (Stage(100, 8, GPU_LONGEST),), indexer=_adamw(5e-3)),
        PhaseSettings(SPARSE, (Stage(100, 16, GPU_LONGEST),), backbone=_adamw(3e-4), indexer=_adamw(1e-3)),
    )
    learnt = PhaseSettings(DISTILL, (Stage(60, 16, GPU_LONGEST),), backbone=cosine, indexer=cosine)
    # An episode ends where its row does; of a row, 64 tokens at least are the prompt's.
    own = {name: dataclasses.replace(policy, max_completion_length=length - 64) for name, length in GPU_LENGTHS.items()}
    shapes = {name: Stage(50, 128, length, max(1, length // 512)) for name, length in GPU_LENGTHS.items()}
    specialists = [
        _policy_stage(name, SPECIALIST, "cold-start", shapes[name], own[name], rate=3e-4, tasks=(name,))
        for name in names
    ]
    dense = dataclasses.replace(own["logic"], attention="dense", freeze_indexer=True, replay=("routes",))
    rows = Stage(40, 128, GPU_LONGEST, micro_batches=8)
    return PostConfig(
        model=gpu_model(),
        stages=(
            PostStage("cold-start", cold, tasks=names),
            *specialists,
            _policy_stage("logic-dense", SPECIALIST, "cold-start", shapes["logic"], dense, rate=3e-4, tasks=("logic",)),
            PostStage("distilled", (learnt,), begins="cold-start", tasks=names, samples_of=names, samples=1024),
            _policy_stage("mixed", MIXED, "distilled", rows, policy, rate=2e-4, tasks=names),
            _on_policy_stage("on-policy", "cold-start", rows, policy, rate=2e-4, teachers=names),
        ),
        evaluation_prompts=512,
        checkpoint_every=20,
    )


def _on_policy_stage(
    name: str, begins: str, shape: Stage, policy: PolicySettings, *, rate: float, teachers: tuple[str, ...]
) -> PostStage:
    """Makes a stage of on-policy distillation from specialists that are called by their tasks."""
    settings = PhaseSettings(ON_POLICY, (shape,), backbone=_adamw(rate), indexer=_adamw(rate))
    return PostStage(name, (settings,), begins=begins, tasks=teachers, policy=policy, teachers=teachers)


def gpu_tasks() -> dict[str, Task]:
    """Makes the tasks of `post`, those whose answers a rule can check."""
    from train.post.environments import make_tasks

    return {task.name: task for task in make_tasks("large", tuple(GPU_LENGTHS))}


# From a checkpoint of one's own, for a task of one's own


def grpo() -> PostConfig:
    """Makes one stage of GRPO over the user's tasks, to be changed: its rates suit a small model."""
    policy = PolicySettings(num_generations=8, max_completion_length=512, off_policy_mask_threshold=0.5)
    rows = Stage(100, 64, 1024)
    return PostConfig(
        model=Config.tiny(),
        stages=(_policy_stage("grpo", SPECIALIST, "", rows, policy, rate=1e-6),),
        evaluation_prompts=64,
    )


PRESETS = {
    "tiny": Preset(tiny, tiny_tasks),
    "controls": Preset(controls, controls_tasks),
    "post": Preset(post, gpu_tasks),
    "grpo": Preset(grpo),
}


def load_preset(name: str, model: Config | None = None) -> PostConfig:
    """Makes the preset of that name, or reads a JSON file, such as the `post.json` of a folder.

    Args:
      name: of a preset, or a path that ends in .json.
      model: of the weights that the whole begins with, in place of the preset's own.

    Raises:
      ValueError: if there is no such preset, or the file does not describe one.
    """
    if name in PRESETS:
        made = PRESETS[name].config()
        return made if model is None else dataclasses.replace(made, model=model)
    if not name.endswith(".json"):
        raise ValueError(f"preset must be {', '.join(PRESETS)} or a .json file, got {shown(name)}")
    values = read_json_file(Path(name), "preset")
    values = values.get("post", values) if isinstance(values, dict) else values
    if isinstance(values, dict) and model is not None:
        values = {**values, "model": as_json(model)}
    return PostConfig.from_json(values)
