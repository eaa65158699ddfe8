"""Shows where a run stands, live on a terminal and line by line elsewhere."""

import collections
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from train.phases import Phase
from train.settings import RunConfig

LINE_SECONDS = 10.0  # between two lines where there is no terminal
SPEED_STEPS = 16  # over which the speed is measured


class RunProgress:
    """Shows phase, step, loss, KL, tokens/s and the time left of one run."""

    def __init__(self, config: RunConfig, *, title: str = "", console: Console | None = None):
        self._config, self._title = config, title
        self._console = console or Console()
        self._times = collections.deque(maxlen=SPEED_STEPS + 1)
        self._shape, self._task, self._last_line = None, None, 0.0
        self._held_out: list[str] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        self._bar = Progress(*columns, console=self._console, auto_refresh=False)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line of its own."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def update(self, phase: int, phase_step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of step `phase_step` of phase number `phase`."""
        settings = self._config.phases[phase]
        if "held_out_loss" in metrics:
            self._held_out = [f"held-out {metrics['held_out_loss']:.4f}"]
        elif phase_step == 1:
            self._held_out = []
        losses = (*_losses(settings.phase, metrics), *self._held_out)
        numbers = "  ".join((*losses, *self._speed(phase, phase_step)))
        if self._console.is_terminal:
            if self._task is None or self._task[0] != phase:
                name = f"{self._title} {settings.name}".strip()
                self._task = phase, self._bar.add_task(name, total=settings.steps, numbers="")
            self._bar.update(self._task[1], completed=phase_step, numbers=numbers)
            self._bar.refresh()
            return
        now = time.monotonic()
        if phase_step in (1, settings.steps) or now - self._last_line > LINE_SECONDS:
            self._last_line = now
            self.say(f"{self._title} {settings.name} {phase_step}/{settings.steps}  {numbers}".strip())

    def _speed(self, phase: int, phase_step: int) -> list[str]:
        shape, left = self._remaining(phase, phase_step)
        if shape != self._shape:
            self._times.clear()  # the first step of a shape compiles: its time says nothing of the others
            self._shape = shape
        self._times.append(time.monotonic())
        if len(self._times) < 2:
            return []
        speed = shape[1] * (len(self._times) - 1) / max(self._times[-1] - self._times[0], 1e-9)
        minutes, seconds = divmod(round(left / speed), 60)
        return [f"{speed:,.0f} tokens/s", f"{minutes}:{seconds:02d} left"]

    def _remaining(self, phase: int, phase_step: int) -> tuple[tuple, int]:
        """Finds the stage that the step belongs to, with its tokens a step, and the tokens left in the run."""
        stages = [(i, j, s) for i, p in enumerate(self._config.phases) for j, s in enumerate(p.stages)]
        before = sum(p.steps for p in self._config.phases[:phase]) + phase_step
        shape, left = ((0, 0), 0), 0
        for i, j, stage in stages:
            tokens, taken = stage.batch_size * stage.seq_len, min(stage.steps, max(before, 0))
            if taken:
                shape = (i, j), tokens
            left += tokens * (stage.steps - taken)
            before -= stage.steps
        return shape, left


def _losses(phase: Phase, metrics: dict[str, float]) -> list[str]:
    """Writes the losses of a phase as they are called on a terminal."""
    labels = {"lm_loss": "loss", "kl": "KL"}
    return [f"{labels.get(name, name)} {metrics[name]:.4f}" for name, _ in phase.losses if name in metrics]
