"""Takes a post-training through its stages: each a run in its folder, from the weights of the one before."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from dsa_jax.parallel.sharding import describe, shards
from train.data import Batch, BatchStream
from train.files import read_json_file, replace_arrays, replace_text
from train.phases import Params
from train.post.environment import Episode, Task
from train.post.episodes import EpisodeStore, open_store
from train.post.measuring import measure_task, selection_overlap
from train.post.policy import REPLAYS, PolicySettings
from train.post.recorded import Recording
from train.post.rewards import score
from train.post.rollout import Rollouts
from train.post.rows import episode_rows
from train.post.sft import Samples, demonstration_stream, keep_best, sample_stream
from train.post.stages import PostConfig, PostStage, tasks_of
from train.post.stream import PolicyStream, Score, make_score
from train.post.text import TurnText
from train.processes.stopping import StoppedError, Stopping
from train.run import Run
from train.saved.checkpoint import load_params
from train.saved.folder import checkpoint_steps
from train.saved.initial import InitialParams
from train.settings import stream_seed
from train.state import abstract_params
from train.watching.progress import RunProgress

CONFIG_FILE, MEASURED_FILE = "post.json", "measured.json"
SAMPLE_ROWS = 64  # episodes of a specialist that are sampled together, 4 of a problem
SAMPLES_OF_PROBLEM = 4


@dataclasses.dataclass(frozen=True)
class PostTraining:
    """Trains, samples and measures all stages in a folder; killed at any moment it goes on where it was.

    Args:
      config: what is trained.
      folder: gets a folder for each stage, and `post.json`.
      tasks: by their names.
      init: the weights that the whole begins with, None for drawn ones.
      command: how a command made it; it is recorded.
      stopping: signals and the clock.
      console: where it says what it does.
      mesh: the devices on which rollouts and training alternate; one if None. It may be another when a run goes on.
    """

    config: PostConfig
    folder: Path
    tasks: Mapping[str, Task]
    init: InitialParams | None = None
    command: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    stopping: Stopping | None = None
    console: Console = dataclasses.field(default_factory=Console)
    mesh: Mesh | None = None

    def run(self, *, resume: bool = False) -> dict[str, dict[str, Any]]:
        """Takes all stages to their ends, and gives what was measured of each.

        Raises:
          ValueError: for whatever cannot be, with one line that says it.
          StoppedError: if it was stopped, saved.
        """
        if jax.process_count() > 1:
            raise ValueError(f"post-training runs in one process, got {jax.process_count()}")
        self.check()
        self._record(resume)
        return {stage.name: self._stage(stage) for stage in self.config.stages}

    def check(self) -> None:
        """Checks all stages against the tasks and the tokenizer, before any of them begins.

        Raises:
          ValueError: naming what does not fit.
        """
        first = self.config.stages[0]
        if self.init is None and first.phases[0].name != "BASE":
            raise ValueError(f"stage {first.name} must begin from a checkpoint: give --init")
        for stage in self.config.stages:
            tasks_of(stage, self.tasks)
            self._check_mesh(stage)
        for stage in self.config.stages:
            if stage.teachers:
                self._teacher_stages(stage)
        _ = self.text

    def _check_mesh(self, stage: PostStage) -> None:
        """Checks that the mesh can train a stage and play its episodes."""
        Run(self.config.run_config(stage), self.folder, mesh=self.mesh)  # which checks the former
        is_measured = stage.policy is not None or self.config.evaluation_prompts
        is_dense = stage.run_phases()[-1].phase.attention == "dense"
        if self.mesh is not None and is_dense and is_measured and shards(self.mesh, "pages") > 1:
            raise ValueError(
                f"stage {stage.name} plays episodes with dense attention, which a mesh that splits their sequences "
                f"cannot, got {describe(dict(self.mesh.shape))}"
            )

    @property
    def text(self) -> TurnText:
        """Turns texts into tokens."""
        config = self.config
        return TurnText.load(config.tokenizer, vocab_size=config.model.vocab_size, end_of_turn=config.end_of_turn)

    def _record(self, resume: bool) -> None:
        """Writes `post.json`, or compares it with what is to go on."""
        path = self.folder / CONFIG_FILE
        here = {"post": self.config.to_json(), "tasks": list(self.tasks), "command": dict(self.command)}
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(here, indent=2) + "\n")
            return
        if not resume:
            raise ValueError(
                f"{self.folder} already holds a post-training: --resume continues it, another --out leaves it"
            )
        recorded = read_json_file(path, CONFIG_FILE)
        if recorded != here:
            # Read and written again, for a field that is new has its default.
            self._check_changes(PostConfig.from_json(recorded.get("post")).to_json(), here["post"])
            replace_text(path, json.dumps(here, indent=2) + "\n")

    def _check_changes(self, before: dict[str, Any], here: dict[str, Any]) -> None:
        """Checks that stages which have begun stay as they are; what comes later may be another."""
        stages = {stage["name"]: stage for stage in before.get("stages", [])}
        begun = [name for name in stages if (self.folder / name / "run.json").exists()]
        now = {stage["name"]: stage for stage in here["stages"]}
        for name in begun:
            if now.get(name) != stages[name]:
                what = "is missing" if name not in now else "is another"
                raise ValueError(f"stage {name} in {self.folder} has begun and must stay as it was, but {what} here")
        for name in ("model", "seed", "end_of_turn", "tokenizer"):
            if before.get(name) != here[name] and begun:
                raise ValueError(f"{name} of the post-training in {self.folder} must stay as it was")

    # A stage

    def _stage(self, stage: PostStage) -> dict[str, Any]:
        path = self.folder / stage.name / MEASURED_FILE
        if path.exists():
            return read_json_file(path, MEASURED_FILE)
        began, run = time.monotonic(), self._run(stage)
        progress = RunProgress(run.config, title=stage.name, console=self.console)
        with self._data(stage, run) as data:
            state = run.train(data, progress, resume=True, stopping=self.stopping, compile_ahead=False)
        measured = self._measure(stage, run, state.params) if self.config.evaluation_prompts else {}
        found = {"tasks": measured, "seconds_here": round(time.monotonic() - began, 1)} | self._overlap(
            stage, run, state.params
        )
        replace_text(path, json.dumps(found, indent=1) + "\n")
        for name, each in measured.items():
            right = f"{name} {each['correct']:.3f} ± {each['interval']:.3f}"
            text = f"{stage.name}: {right}, {each['output_tokens']:.1f} tokens"
            self.console.print(text, markup=False, highlight=False)
        return found

    def _run(self, stage: PostStage) -> Run:
        init = InitialParams(self.folder / stage.begins, label=stage.begins) if stage.begins else self.init
        return Run(self.config.run_config(stage), self.folder / stage.name, init, self.mesh)

    @contextlib.contextmanager
    def _data(self, stage: PostStage, run: Run) -> Iterator[BatchStream]:
        """Opens what gives the batches of a stage."""
        seed, tasks = stream_seed(self.config.seed, stage.phases[0].phase.stream, 0), tasks_of(stage, self.tasks)
        if stage.policy is not None:
            uses, stale = stage.policy.num_iterations, stage.policy.updates_per_rollout - 1
            with open_store(run.folder / "episodes", most_stale=stale, uses=uses) as store:
                yield self._policy_stream(stage, run, stage.policy, store, seed)
        elif stage.samples_of:
            yield sample_stream(self._samples(stage), stage.phases, seed)
        else:
            yield demonstration_stream(tasks, self.text, stage.phases, seed)

    def _policy_stream(
        self, stage: PostStage, run: Run, policy: PolicySettings, store: EpisodeStore, seed: int
    ) -> PolicyStream:
        shapes = stage.phases[0].stages
        if len({(each.batch_size, each.seq_len) for each in shapes}) > 1:
            raise ValueError(f"stage {stage.name} samples its batches: all of its stages must have one shape")
        reference = make_score(run.graphdef, run.initial_params(), policy, self.mesh) if policy.beta else None
        teachers = {
            task: self._weights(name, policy) for name, tasks in self._teacher_stages(stage).items() for task in tasks
        }
        return PolicyStream(
            sampler=make_sampler(run.graphdef, self.text, shapes[0].seq_len, policy, self.mesh),
            store=store,
            tasks=tasks_of(stage, self.tasks),
            settings=policy,
            batch_size=shapes[0].batch_size,
            seq_len=shapes[0].seq_len,
            seed=seed,
            saved=lambda: min(checkpoint_steps(run.folder), default=0),
            reference=reference,
            teachers=teachers,
        )

    def _teacher_stages(self, stage: PostStage) -> dict[str, list[str]]:
        """Finds the tasks that each teacher scores.

        Raises:
          ValueError: if a task has no teacher, or two.
        """
        if not stage.teachers:
            return {}
        wanted = list(dict.fromkeys(task.name for task in tasks_of(stage, self.tasks)))
        found = {name: [t.name for t in tasks_of(self.config.stage(name), self.tasks)] for name in stage.teachers}
        for task in wanted:
            able = [name for name, tasks in found.items() if task in tasks]
            if len(able) != 1:
                raise ValueError(
                    f"task {task} of stage {stage.name} must have one teacher, got {', '.join(able) or 'none'}"
                )
        return {name: [task for task in tasks if task in wanted] for name, tasks in found.items()}

    def _weights(self, name: str, policy: PolicySettings) -> Score:
        graphdef, like = abstract_params(self.config.model, self.mesh)
        return make_score(graphdef, load_params(self.folder / name, like), policy, self.mesh)

    # Samples

    def _samples(self, stage: PostStage) -> dict[str, Samples]:
        """Samples specialists on their tasks, a file each, or reads the files."""
        found: dict[str, Samples] = {}
        for name in stage.samples_of:
            source = self.config.stage(name)
            for task in {task.name: task for task in tasks_of(source, self.tasks)}.values():
                path = self.folder / stage.name / "samples" / f"{name}.{task.name}.npz"
                if not path.exists():
                    self._sample(stage, source, task).save(path)
                    self._pause()
                found[f"{name}/{task.name}"] = Samples.load(path)
        return found

    def _sample(self, stage: PostStage, source: PostStage, task: Task) -> Samples:
        run, policy = self._run(source), self.config.sampling(source)
        sampler = make_sampler(run.graphdef, self.text, source.seq_len, policy, self.mesh)
        sampler.update(load_params(run.folder, abstract_params(self.config.model, self.mesh)[1]))
        draw = np.random.default_rng([self.config.seed, 3, list(self.tasks).index(task.name)])
        episodes: list[Episode] = []
        while len(episodes) < stage.samples:
            count = min(SAMPLE_ROWS, stage.samples - len(episodes)) // SAMPLES_OF_PROBLEM or 1
            episodes += sampler.sample(
                [(task, int(number)) for number in draw.integers(task.held_out, size=count)],
                num_generations=SAMPLES_OF_PROBLEM,
                seed=int(draw.integers(2**31)),
                **policy.draws,
            )
        scores = score(task.rewards, episodes)
        kept = [i for i, episode in enumerate(episodes) if episode.ended != "error"]
        if stage.keep_samples == "best":
            kept = keep_best(episodes, scores)
        text = f"{stage.name}: kept {len(kept)} of {len(episodes)} samples of {source.name} on {task.name}"
        self.console.print(text, markup=False, highlight=False)
        return Samples.of([episodes[i] for i in kept])

    # Measuring

    def _measure(self, stage: PostStage, run: Run, params: Params) -> dict[str, Any]:
        """Measures the stage on its tasks, a file each; one that is there is not measured again."""
        policy = self.config.sampling(stage)
        if stage.policy is None:
            policy = dataclasses.replace(policy, attention=stage.phases[-1].phase.attention, freeze_indexer=True)
        sampler = make_sampler(run.graphdef, self.text, stage.seq_len, policy, self.mesh)
        found = {}
        for task in {task.name: task for task in tasks_of(stage, self.tasks)}.values():
            path = run.folder / f"measured.{task.name}.json"
            if not path.exists():
                sampler.update(params)
                numbers, episodes = measure_task(
                    sampler, task, self.config.evaluation_prompts, policy, self.config.seed
                )
                examples = [_shown(episode) for episode in episodes[:3]]
                replace_text(path, json.dumps({**numbers, "examples": examples}, indent=1) + "\n")
                _save_rows(run.folder / "measured_rows.npz", episodes, stage.seq_len)
                self._pause()
            found[task.name] = read_json_file(path, path.name)
        return found

    def _overlap(self, stage: PostStage, run: Run, params: Params) -> dict[str, float]:
        """Measures how much of the indexer's choice is that of the indexer with which the stage began."""
        path = run.folder / "measured_rows.npz"
        is_sparse = stage.run_phases()[-1].phase.attention == "sparse"
        if stage.policy is None or not is_sparse or not path.exists():
            return {}
        with np.load(path) as arrays:
            batch = Batch(**{name: arrays[name] for name in arrays.files})
        share = selection_overlap(run.graphdef, params, run.initial_params(), batch, self.mesh)
        return {} if share is None else {"selection_overlap": share}

    def _pause(self) -> None:
        """Stops between two pieces of work that are saved, where it is time."""
        if self.stopping is not None and (status := self.stopping.due) is not None:
            raise StoppedError(0, status)


def make_sampler(
    graphdef: nnx.GraphDef, text: TurnText, seq_len: int, policy: PolicySettings, mesh: Mesh | None = None
) -> Rollouts:
    """Makes what plays episodes by the settings of a policy, and records what it replays."""
    record = Recording(**{name: name in policy.replay for name in REPLAYS})
    rows = policy.rollout_rows if mesh is None else -(-policy.rollout_rows // shards(mesh, "rows"))
    return Rollouts(graphdef, text, seq_len, policy.attention, rows=rows, record=record, mesh=mesh)


def _save_rows(path: Path, episodes: list[Episode], seq_len: int) -> None:
    arrays = episode_rows([episode for episode in episodes if episode.turns], seq_len)
    arrays.pop("old_log_probs")
    replace_arrays(path, **arrays)


def _shown(episode: Episode) -> dict[str, Any]:
    """Writes an episode for readers."""
    turns = [[turn.text, turn.observation] for turn in episode.turns]
    return {"problem": episode.problem, "prompt": episode.prompt, "turns": turns, "ended": episode.ended}
