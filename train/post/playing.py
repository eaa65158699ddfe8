"""The rounds of a rollout: who sits in which row, what each reads, draws and does, and why episodes end."""

import collections
import dataclasses
import json
import logging
import time
from collections.abc import Iterable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsa_jax.inference.sampling import kind_of
from dsa_jax.inference.turns import Drawn, Taken, Turns, row_settings
from train.checks import shown
from train.post.calls import UnansweredError, call_all
from train.post.chat import Chat, NoTemplateError
from train.post.environment import Environment, Episode, Step, Task, Turn, no_tokens
from train.post.recorded import Recorded, Recording, join_kept, narrow_routes

logger = logging.getLogger(__name__)

type Problem = tuple[Task, int]

MAX_ERROR = 300  # characters of what an environment raised


class Text(Protocol):
    """Turns texts into tokens and back; `end_id` ends a turn of the model.

    Where it has a `chat(messages, tools, thinking)` as `TurnText` has, prompts and answers may be messages.
    """

    @property
    def end_id(self) -> int:
        """The token that ends a turn."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Encodes a prompt or an answer, int32."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """Decodes a turn, without its end."""
        ...


@dataclasses.dataclass
class _Seat:
    """Holds an episode that is played, and its sequence in the cache."""

    episode: Episode
    task: Task
    index: int  # of the episode, which decides what it draws
    deadline: float
    chat: Chat | None = None  # of an episode whose prompt is messages
    sequence: int = -1
    unread: np.ndarray = dataclasses.field(default_factory=no_tokens)
    drawn: int = 0  # tokens of the model's
    used: int = 0  # tokens behind the prompt
    taken: list[Taken] = dataclasses.field(default_factory=list)
    kept: list[np.ndarray | None] = dataclasses.field(default_factory=list)

    @property
    def length(self) -> int:
        """Counts the tokens of the sequence, those that are not read yet among them."""
        return len(self.episode.prompt_tokens) + self.used


@dataclasses.dataclass(frozen=True)
class Draws:
    """Says how tokens are drawn."""

    temperature: float
    top_p: float
    top_k: int
    seed: int
    lists: bool  # whether kept sets are recorded
    seconds: float  # of an episode
    most: int  # tokens of an episode behind its prompt

    def seed_of(self, index: int) -> int:
        """Returns the seed of an episode."""
        return int(np.random.SeedSequence([self.seed, index]).generate_state(1)[0])


class Play:
    """Plays the episodes of one call of `Rollouts.sample`.

    Args:
      turns: reads and draws.
      text: texts as tokens.
      draws: how tokens are drawn, and how many.
      rows: of the cache, on all shards.
      seq_len: tokens of an episode at most.
      record: what is recorded.
      version: is written into the episodes.
    """

    def __init__(
        self, turns: Turns, text: Text, draws: Draws, *, rows: int, seq_len: int, record: Recording, version: int
    ):
        self.turns, self.text, self.draws, self.seq_len = turns, text, draws, seq_len
        self.record, self.version, self.cache = record, version, turns.cache
        self.seats: list[_Seat | None] = [None] * rows
        self.logits: Array | None = None

    @property
    def live(self) -> bool:
        """Tells whether anybody plays."""
        return any(seat is not None for seat in self.seats)

    def clear(self) -> None:
        """Frees all that is in the cache, whatever has interrupted the play."""
        self.seats = [None] * len(self.seats)
        for sequence in self.cache.sequences:
            self.cache.free(sequence)

    def round(self, queue: collections.deque[tuple[int, Problem]]) -> Iterable[tuple[int, Episode]]:
        """Seats new episodes, has all read, draw and act; returns those that have ended, with their numbers."""
        ended = self._admit(queue)
        self._read()
        drawn = self._draw()
        acting = [place for place, turn in enumerate(drawn) if turn is not None and self._take(place, turn)]
        self._act(acting)
        for place, seat in enumerate(self.seats):
            if seat is not None and not seat.episode.ended and time.monotonic() > seat.deadline:
                seat.episode.ended = "seconds"
            if seat is not None and seat.episode.ended:
                ended.append((seat.index, self._finish(seat)))
                self._leave(place)
        return ended

    # Beginning.

    def _admit(self, queue) -> list[tuple[int, Episode]]:
        """Seats as many of the queue as there is room for, and reads their prompts; returns those that cannot begin."""
        refused: list[tuple[int, Episode]] = []
        free = [place for place, seat in enumerate(self.seats) if seat is None]
        seated: list[int] = []
        while free and queue:
            coming = [queue.popleft() for _ in range(min(len(free), len(queue)))]
            for seat in self._begin(coming):
                if seat.episode.ended:
                    refused.append((seat.index, seat.episode))
                else:
                    self.seats[free[0]] = seat
                    seated.append(free.pop(0))
        if seated:
            self._read_prompts(seated)
        return refused

    def _begin(self, coming: list[tuple[int, Problem]]) -> list[_Seat]:
        """Makes environments and asks them for their prompts."""
        begun = time.monotonic()

        def make(task: Task, number: int) -> tuple[Environment, Any]:
            environment = task.make(number)
            return environment, environment.reset()

        calls = [lambda task=task, number=number: make(task, number) for _, (task, number) in coming]
        seats = []
        for (index, (task, number)), made in zip(
            coming, call_all(calls, [begun + self.draws.seconds] * len(calls)), strict=True
        ):
            environment, prompt = made if isinstance(made, tuple) else (None, "")
            episode = Episode(
                task.name, number, _written(prompt), no_tokens(), [], environment, "",  # pyright: ignore
                version=self.version,
            )  # fmt: skip
            seat = _Seat(episode, task, index, begun + self.draws.seconds)
            if isinstance(made, BaseException):
                _end_by(episode, made)
            else:
                self._encode_prompt(seat, prompt)
            seats.append(seat)
        return seats

    def _encode_prompt(self, seat: _Seat, prompt: Any) -> None:
        """Encodes the prompt; one that leaves no room for a token ends the episode."""
        episode = seat.episode
        try:
            if _is_messages(prompt):
                begin: Any = getattr(self.text, "chat", None)
                if begin is None:
                    raise TypeError("prompt must be a text where there is no template, got messages")
                seat.chat = begin(prompt, getattr(episode.environment, "tools", None), thinking=seat.task.thinking)
            episode.prompt_tokens = self._encode("prompt", prompt if seat.chat is None else seat.chat.prompt())
        except NoTemplateError:  # every episode would end by it
            raise
        except Exception as error:
            _end_by(episode, error)
            return
        count = len(episode.prompt_tokens)
        if not 1 <= count < self.seq_len:
            episode.ended = "full"
            episode.error = (
                f"the prompt of problem {episode.problem} of task {episode.task} must be from 1 to "
                f"{self.seq_len - 1} tokens to fit seq_len {self.seq_len}, got {count}"
            )
            logger.warning("%s; the run goes on without it", episode.error)

    def _read_prompts(self, places: list[int]) -> None:
        """Reads every prompt once on each shard that has seats for it; who has the same shares its pages."""
        leaders: dict[tuple[int, bytes], list[int]] = {}
        for place in places:
            key = self._shard(place), self._seat(place).episode.prompt_tokens.tobytes()
            leaders.setdefault(key, []).append(place)
        by_shard = [[group for (own, _), group in leaders.items() if own == s] for s in range(self.cache.row_shards)]
        # As many rows as groups have begun with, so that one program reads the prompts of all rounds.
        size = max(1 << max(max(map(len, by_shard)) - 1, 0).bit_length(), 1)
        rows: list[int | None] = [None] * (size * len(by_shard))
        tokens, groups = [no_tokens()] * len(rows), {}
        for shard, own in enumerate(by_shard):
            for turn, group in enumerate(own):
                row = shard * size + turn
                rows[row], groups[row] = self.cache.new(shard), group
                tokens[row] = self._seat(group[0]).episode.prompt_tokens
        logits, taken = self.turns.read(rows, tokens)
        source = np.full(len(self.seats), -1, np.int32)
        for row, group in groups.items():
            first = rows[row]
            assert first is not None
            for number, place in enumerate(group):
                seat = self._seat(place)
                seat.sequence = self.cache.fork(first) if number else first
                seat.taken.append(taken[row])
                seat.kept += [None] * len(tokens[row])
                source[place] = row
        self._put(logits, source)

    # A round.

    def _read(self) -> None:
        """Has all seats read that have something to read."""
        rows: list[int | None] = [None] * len(self.seats)
        tokens = [no_tokens()] * len(rows)
        for place, seat in enumerate(self.seats):
            if seat is not None and len(seat.unread):
                rows[place], tokens[place], seat.unread = seat.sequence, seat.unread, no_tokens()
        if all(row is None for row in rows):
            return
        logits, taken = self.turns.read(rows, tokens)
        for place, row in enumerate(rows):
            if row is not None:
                self._seat(place).taken.append(taken[place])
        self._put(logits, np.array([-1 if row is None else place for place, row in enumerate(rows)], np.int32))

    def _put(self, logits: Array, source: np.ndarray) -> None:
        """Takes new logits for some seats, by their rows; -1 leaves a seat's as they are."""
        before = jnp.zeros((len(self.seats), logits.shape[1]), logits.dtype) if self.logits is None else self.logits
        self.logits = _merge(before, logits, source)

    def _draw(self) -> list[Drawn | None]:
        """Draws a turn of every seat."""
        if not self.live:
            return [None] * len(self.seats)
        draws, vocab = self.draws, self.turns.runner.config.vocab_size
        seats = [(seat, self._room(seat)) if seat is not None else None for seat in self.seats]
        settings = row_settings(
            len(seats), vocab, temperature=draws.temperature, top_p=draws.top_p, top_k=draws.top_k,
            seeds=np.array([0 if each is None else draws.seed_of(each[0].index) for each in seats], np.uint32),
        )  # fmt: skip
        kind = kind_of(np.asarray(draws.temperature), np.asarray(draws.top_k), np.asarray(draws.top_p), vocab)
        assert self.logits is not None
        return self.turns.draw(
            [None if each is None else each[0].sequence for each in seats],
            self.logits,
            settings,
            limit=[1 if each is None else each[1] for each in seats],
            number=[0 if each is None else each[0].drawn for each in seats],
            kind=kind,
            kept=draws.top_k if draws.lists else 0,
        )

    def _room(self, seat: _Seat) -> int:
        """Counts the tokens that the model may still write."""
        return min(self.draws.most - seat.used, self.seq_len - seat.length)

    def _take(self, place: int, drawn: Drawn) -> bool:
        """Takes in a turn; returns whether its environment is to answer."""
        seat, tokens = self._seat(place), drawn.tokens
        seat.taken.append(drawn.taken)
        if np.isnan(drawn.log_probs[-1]):  # a token of no distribution: it is none of the episode's
            seat.episode.ended, seat.episode.error = "error", "the model's logits are NaN"
            tokens = tokens[:-1]
        count = len(tokens)
        seat.drawn, seat.used = seat.drawn + count, seat.used + count
        seat.kept += [None] * count if drawn.kept is None else drawn.kept[:count]
        if count:
            text = self.text.decode(tokens[:-1] if tokens[-1] == self.text.end_id else tokens)
            seat.episode.turns.append(Turn(text, tokens, drawn.log_probs[:count]))
        if seat.episode.ended:
            return False
        if tokens[-1] != self.text.end_id:
            seat.episode.ended = "tokens" if seat.used >= self.draws.most else "full"
            return False
        return True

    def _act(self, places: list[int]) -> None:
        """Has the environments answer."""
        seats = [self._seat(place) for place in places]
        texts = [seat.episode.turns[-1].text for seat in seats]
        turns = [text if seat.chat is None else seat.chat.hear(text) for seat, text in zip(seats, texts, strict=True)]
        calls = [
            lambda seat=seat, turn=turn: seat.episode.environment.step(turn)
            for seat, turn in zip(seats, turns, strict=True)
        ]
        for seat, answer in zip(seats, call_all(calls, [seat.deadline for seat in seats]), strict=True):
            if isinstance(answer, BaseException):
                _end_by(seat.episode, answer)
            else:
                self._answer(seat, answer)

    def _answer(self, seat: _Seat, answer: Step) -> None:
        """Appends an environment's answer, or ends the episode."""
        episode = seat.episode
        if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[0], str | list | tuple):
            _end_by(episode, TypeError(f"step must return Step(observation: str, done: bool), got {shown(answer)}"))
            return
        observation, done = answer
        if done:
            episode.ended = "done"
            return
        if len(episode.turns) >= seat.task.max_turns:
            episode.ended = "turns"
            return
        try:
            said = observation if seat.chat is None else seat.chat.answer(observation)  # pyright: ignore
            tokens = self._encode("observation", said)
        except Exception as error:
            _end_by(episode, error)
            return
        room = self._room(seat) - len(tokens)
        if room < 1:  # the model would have nothing left to answer with
            episode.ended = "tokens" if self.draws.most - seat.used <= self.seq_len - seat.length else "full"
            return
        turn = episode.turns[-1]
        turn.observation, turn.observation_tokens = _written(observation), tokens
        seat.unread = np.concatenate([turn.tokens[-1:], tokens])
        seat.used += len(tokens)
        seat.kept += [None] * len(tokens)

    # Ending.

    def _finish(self, seat: _Seat) -> Episode:
        """Joins what was recorded, and leaves out an answer that nothing followed."""
        episode = seat.episode
        if episode.turns and len(episode.turns[-1].observation_tokens):
            episode.turns[-1].observation, episode.turns[-1].observation_tokens = "", no_tokens()
        count = len(episode.prompt_tokens) + sum(len(t.tokens) + len(t.observation_tokens) for t in episode.turns)
        if episode.turns and self.record != Recording():
            episode.recorded = self._recorded(seat, count)
        return episode

    def _recorded(self, seat: _Seat, count: int) -> Recorded:
        """Makes the record of an episode of `count` tokens, tokens first."""
        record = self.record
        tokens_first = lambda x: np.ascontiguousarray(x.swapaxes(0, 1)[: count - 1])  # noqa: E731
        joined: dict[str, np.ndarray] = {}
        for name, wanted in (("routed", record.routes), ("selected", record.selections)):
            if wanted:
                parts: Any = [getattr(each, name) for each in seat.taken]
                joined[name] = tokens_first(np.concatenate(parts, axis=1))
        routes, selections = joined.get("routed"), joined.get("selected")
        if selections is not None and self.seq_len < 2**15:
            selections = selections.astype(np.int16)
        kept = join_kept(seat.kept[:count]) if self.draws.lists else (None, None)
        return Recorded(None if routes is None else narrow_routes(routes), selections, *kept)

    def _encode(self, name: str, value: Any) -> np.ndarray:
        """Encodes what an environment says; raises TypeError or ValueError for no text, or ids that the model lacks.

        What a template has written is tokens already.
        """
        if not isinstance(value, str | np.ndarray):
            raise TypeError(f"{name} must be a text, got {shown(value)}")
        tokens = np.asarray(self.text.encode(value) if isinstance(value, str) else value, np.int32)
        vocab = self.turns.runner.config.vocab_size
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
            raise ValueError(f"{name} must have tokens in [0, {vocab}), got {tokens.min()} … {tokens.max()}")
        return tokens

    def _leave(self, place: int) -> None:
        seat, self.seats[place] = self.seats[place], None
        if seat is not None and seat.sequence >= 0:
            self.cache.free(seat.sequence)

    def _seat(self, place: int) -> _Seat:
        seat = self.seats[place]
        assert seat is not None
        return seat

    def _shard(self, place: int) -> int:
        return place * self.cache.row_shards // len(self.seats)


def _is_messages(said: Any) -> bool:
    return isinstance(said, list | tuple)


def _written(said: Any) -> str:
    """Writes what an environment says for readers: a text as it is, messages as JSON."""
    return json.dumps(said, ensure_ascii=False, default=str) if _is_messages(said) else said


def _end_by(episode: Episode, error: BaseException) -> None:
    """Ends an episode by what its environment raised, or by its time."""
    if isinstance(error, UnansweredError):
        episode.ended, episode.error = "seconds", "the environment did not answer in time"
    else:
        episode.ended, episode.error = "error", f"{type(error).__name__}: {error}"[:MAX_ERROR]
    where = f"problem {episode.problem} of task {episode.task}"
    logger.warning("%s has ended: %s; the run goes on without it", where, episode.error)


@jax.jit
def _merge(before: Array, new: Array, source: Any) -> Array:
    return jnp.where(source[:, None] < 0, before, new[jnp.maximum(source, 0)])
