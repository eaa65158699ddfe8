"""A task, a model and stages that are small enough for tests of post-training."""

from typing import Any

from train_cases import small_config

from dsa_jax import Config
from train.optimizer import OptimizerSettings
from train.phases import BASE, DISTILL, MIXED, SPARSE, SPECIALIST, WARMUP
from train.post.environment import Step, Task
from train.post.policy import PolicySettings
from train.post.stages import PostConfig, PostStage
from train.settings import PhaseSettings, Stage

TOKENS = 24


class Copy:
    """Asks for a letter, twice if there are two turns; the outcome is the share of right ones."""

    def __init__(self, number: int, turns: int):
        self.letter, self.turns, self.right, self.played = "abcd"[number % 4], turns, 0, 0

    @property
    def outcome(self) -> float:
        return self.right / self.turns

    def reset(self) -> str:
        return f"{self.letter}:"

    def step(self, text: str) -> Step:
        self.played += 1
        self.right += text == self.letter
        return Step("again:", self.played == self.turns)


def outcome(episodes) -> list[float]:
    return [episode.environment.outcome for episode in episodes]


def copy_task(name: str = "copy", turns: int = 1, **changes: Any) -> Task:
    values: dict[str, Any] = dict(
        name=name,
        make=lambda number: Copy(number, turns),
        rewards=((outcome, 1.0),),
        demonstrate=lambda number: ["abcd"[number % 4]] * turns,
        max_turns=turns,
    )
    return Task(**values | changes)


def tasks() -> dict[str, Task]:
    return {task.name: task for task in (copy_task(), copy_task("twice", 2))}


def post_model(**changes: Any) -> Config:
    return small_config(**{"vocab_size": 256, "index_topk": 4, **changes})


POLICY = PolicySettings(num_generations=4, max_completion_length=12, off_policy_mask_threshold=0.5)


def policy_stage(
    name="specialist", phase=SPECIALIST, begins="start", *,
    steps=2, rows=8, rate=1e-3, policy=POLICY, tasks=("copy",), **changes,
):  # fmt: skip
    adamw = OptimizerSettings(rate, weight_decay=0.0)
    indexer = None if policy.freeze_indexer else adamw
    settings = PhaseSettings(phase, (Stage(steps, rows, TOKENS),), backbone=adamw, indexer=indexer)
    return PostStage(name, (settings,), begins=begins, tasks=tasks, policy=policy, **changes)


def start_stage(steps: int = 2, *, rows: int = 4, rate: float = 4e-3, dense_alone: bool = False) -> PostStage:
    """Makes the cold start; of BASE alone for tests that need weights and no more."""
    adamw = OptimizerSettings(rate, weight_decay=0.0)
    shape = (Stage(steps, rows, TOKENS),)
    phases = (
        PhaseSettings(BASE, shape, backbone=adamw, bias_rate=1e-2),
        PhaseSettings(WARMUP, shape, indexer=adamw),
        PhaseSettings(SPARSE, shape, backbone=adamw, indexer=adamw),
    )
    return PostStage("start", phases[:1] if dense_alone else phases)


def post_config(*stages: PostStage, **changes: Any) -> PostConfig:
    values: dict[str, Any] = dict(model=post_model(), evaluation_prompts=4, checkpoint_every=1) | changes
    return PostConfig(stages=stages or whole_stages(), **values)


def whole_stages() -> tuple[PostStage, ...]:
    adamw = OptimizerSettings(1e-3, weight_decay=0.0)
    learnt = PhaseSettings(DISTILL, (Stage(2, 4, TOKENS),), backbone=adamw, indexer=adamw)
    return (
        start_stage(),
        policy_stage(),
        PostStage("distilled", (learnt,), begins="start", samples_of=("specialist",), samples=8, keep_samples="all"),
        policy_stage("mixed", MIXED, "distilled", tasks=("copy", "twice")),
    )
