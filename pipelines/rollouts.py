"""A policy in closed loop: environments are Ray actors, one batched policy acts in all of them.

The environments move together: all that play observe, the policy answers them in one forward pass, each
executes the beginning of its chunk. Which episode an environment plays next depends on the lengths of those
before, and the noise of a chunk on (seed, task, episode, chunk) alone, so an evaluation that is repeated with
as many environments gives the same episodes.
"""

import io
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import ray
from numpy.typing import NDArray

from pipelines.environments import Observation, environment_class, variables_of
from pipelines.plan import ROLLOUT_NOISE, generator_seed

FILM_PX = 256
"""Least side of a film: smaller pictures are enlarged by a whole number."""
FILM_FPS = 20
CPUS_PER_ENVIRONMENT = 0.25
"""It stands still while the policy thinks."""


@dataclass(frozen=True, kw_only=True)
class Play:
    """An episode that is to be played."""

    task: str
    n_action_steps: int
    """Actions of a chunk that are executed before the next one is asked for."""
    number: int
    """Of the episode, from 0; with the seed it decides how the world is set up."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """An episode that was played."""

    play: Play
    instruction: str
    seed: int
    """What the environment was reset with."""
    success: bool
    steps: int
    """Actions until success, or the environment's limit."""
    actions: NDArray[np.float32]
    """(steps, A): with the seed they are the whole episode."""


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """What is played, and with what."""

    env: str
    """A known environment, or package.module:Class; see pipelines/environments."""
    tasks: tuple[str, ...]
    episodes: int
    """Of each task and number of steps."""
    n_action_steps: tuple[int, ...]
    seed: int = 0
    size_px: int = 96
    """Of the pictures that the policy is given."""
    cameras: tuple[str, ...]
    """Columns of those pictures, as the environment calls them."""
    num_environments: int = 8
    max_steps: int | None = None
    """Actions after which an episode has failed; None: the environment's own limit."""
    blank_images: bool = False
    """Whether the policy sees black pictures only, to measure what it uses its eyes for."""

    @property
    def plays(self) -> list[Play]:
        """All episodes, in the order in which they are begun."""
        return [
            Play(task=task, n_action_steps=steps, number=number)
            for steps in self.n_action_steps
            for task in self.tasks
            for number in range(self.episodes)
        ]

    @property
    def stages(self) -> int:
        """Environments at once: no more than there are episodes."""
        return min(self.num_environments, len(self.plays))

    def environment_seed(self, play: Play) -> int:
        """What the episode's world is drawn from; the same for every policy and number of steps."""
        words = [self.seed, zlib.crc32(play.task.encode()), play.number]
        return int(np.random.SeedSequence(words).generate_state(1)[0])

    def noise_seed(self, play: Play, chunk: int) -> int:
        """Of the noise that a chunk begins as."""
        task = zlib.crc32(play.task.encode())
        return generator_seed(ROLLOUT_NOISE, self.seed, task, play.number, play.n_action_steps, chunk)


@ray.remote
class Stage:
    """One environment at a time, in a process of its own."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        self._task, self._env = "", None

    def begin(self, play: Play) -> tuple[Observation, str, int]:
        """The first observation of an episode, the instruction, and the limit of its actions."""
        env = self._environment(play.task)
        observation = env.reset(self._rollouts.environment_seed(play))
        return observation, env.instruction, self._rollouts.max_steps or env.max_steps

    def go_on(self, actions: NDArray[np.float32]) -> tuple[Observation, int, bool]:
        """Execute actions (n, A) up to success: what is seen then, how many it were, whether it is solved."""
        assert self._env is not None
        for count, action in enumerate(actions, start=1):
            if self._env.step(action):
                return self._env.observe(), count, True
        return self._env.observe(), len(actions), False

    def film(self, played: Played, *, fps: float) -> bytes:
        """Play an episode again, by its seed and its actions, in front of the camera: an mp4 file."""
        env = self._environment(played.play.task)
        env.reset(played.seed)
        every = max(round(fps / FILM_FPS), 1)
        frames = [env.render()]
        for count, action in enumerate(played.actions, start=1):
            env.step(action)
            if count % every == 0 or count == len(played.actions):
                frames.append(env.render())
        return film(frames, fps=FILM_FPS)

    def _environment(self, task: str) -> Any:
        if task != self._task:
            if self._env is not None:
                self._env.close()
            found = environment_class(self._rollouts.env)
            self._env = found(task, size_px=self._rollouts.size_px, cameras=self._rollouts.cameras)
            self._task = task
        return self._env


@ray.remote
class Actor:
    """The policy that answers all environments in one pass.

    Args:
        fetch: gives the folder of the policy on the actor's node.
        threads: of torch; None leaves them as they are.
    """

    def __init__(self, fetch: Callable[[], Path], *, threads: int | None) -> None:
        import torch

        from smolvla import SmolVLAPolicy

        if threads:
            torch.set_num_threads(threads)
        self._policy = SmolVLAPolicy.from_pretrained(fetch()).eval()
        if torch.cuda.is_available():
            self._policy.to("cuda")

    def chunk_size(self) -> int:
        """Actions that it gives at once."""
        return self._policy.config.chunk_size

    def act(
        self, observations: Sequence[Observation], instructions: Sequence[str], seeds: Sequence[int]
    ) -> tuple[NDArray[np.float32], float]:
        """Chunks (B, H, A) in the dataset's units, and the seconds that they took."""
        import time

        import torch

        from smolvla.data_utils import sample_noise

        started = time.perf_counter()
        names = observations[0].keys()
        columns: dict[str, Any] = {name: np.stack([found[name] for found in observations]) for name in names}
        columns = {
            name: torch.from_numpy(values).permute(0, 3, 1, 2)
            if values.ndim == 4
            else torch.from_numpy(values)
            for name, values in columns.items()
        }
        config = self._policy.config
        shape = (1, config.chunk_size, config.max_action_dim)
        noise = torch.cat([sample_noise(shape, torch.Generator().manual_seed(seed)) for seed in seeds])
        chunks = self._policy.predict_actions(columns | {"task": list(instructions)}, noise)
        return chunks.float().cpu().numpy(), time.perf_counter() - started


def on_nodes_with(resource: str) -> dict[str, float]:
    """What an actor asks of Ray to be on a node that has a resource, as much of it as there may be actors."""
    return {resource: 1e-3} if resource else {}


@dataclass
class _Seat:
    """An environment, and the episode that is played in it."""

    stage: Any
    play: Play | None = None
    observation: Observation = field(default_factory=dict)
    instruction: str = ""
    left: int = 0
    chunks: int = 0
    actions: list[NDArray[np.float32]] = field(default_factory=list)


class Theatre:
    """The actors of an evaluation; they live until `close`.

    Args:
        rollouts: what is played.
        fetch: gives the folder of the policy on any node.
        num_gpus: of the policy, 0 or 1.
        cpus: of the policy.
        resource: name of a resource of Ray's that the nodes of all actors must have; empty: any node.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        fetch: Callable[[], Path],
        *,
        num_gpus: float = 0,
        cpus: float = 1,
        resource: str = "",
    ) -> None:
        self._rollouts = rollouts
        variables = dict(variables_of(environment_class(rollouts.env)))
        place = {"resources": on_nodes_with(resource)}
        settings: dict[str, Any] = place | {
            "num_cpus": CPUS_PER_ENVIRONMENT,
            "runtime_env": {"env_vars": variables},
        }
        stage_class, actor_class = cast("Any", Stage), cast("Any", Actor)
        self._stages = [stage_class.options(**settings).remote(rollouts) for _ in range(rollouts.stages)]
        threads = None if num_gpus else max(int(cpus), 1)
        options = place | {"num_cpus": cpus, "num_gpus": num_gpus}
        self._actor = actor_class.options(**options).remote(fetch, threads=threads)
        self.latencies_s: list[tuple[int, float]] = []
        """(environments that were answered together, seconds)."""

    def check(self) -> None:
        """Refuse more steps than the policy gives.

        Raises:
            ValueError: names the flag.
        """
        size: Any = ray.get(self._actor.chunk_size.remote())
        for steps in self._rollouts.n_action_steps:
            if not 1 <= steps <= size:
                raise ValueError(f"n_action_steps {steps} is not within 1..{size}, the policy's chunk")

    def play(self) -> Iterator[Played]:
        """Play all episodes; each is yielded when it has ended.

        Raises:
            ray.exceptions.RayTaskError: an environment or the policy failed; its cause says how.
        """
        waiting = deque(self._rollouts.plays)
        seats = [_Seat(stage) for stage in self._stages]
        while waiting or any(seat.play for seat in seats):
            self._fill(seats, waiting)
            playing = [seat for seat in seats if seat.play]
            chunks = self._answered(playing)
            moves = []
            for seat, chunk in zip(playing, chunks, strict=True):
                assert seat.play is not None
                count = min(seat.play.n_action_steps, seat.left)
                seat.actions.append(chunk[:count])
                moves.append(seat.stage.go_on.remote(chunk[:count]))
            for seat, (observation, count, solved) in zip(playing, ray.get(moves), strict=True):
                seat.observation, seat.left, seat.chunks = observation, seat.left - count, seat.chunks + 1
                seat.actions[-1] = seat.actions[-1][:count]
                if solved or seat.left == 0:
                    yield self._ended(seat, success=solved)
                    seat.play = None

    def films(self, chosen: Sequence[Played], *, fps: float) -> Iterator[tuple[Played, bytes]]:
        """Episodes, and an mp4 film of each: they are played once more, without the policy."""
        for first in range(0, len(chosen), len(self._stages)):
            some = chosen[first : first + len(self._stages)]
            films = [
                stage.film.remote(played, fps=fps) for stage, played in zip(self._stages, some, strict=False)
            ]
            yield from zip(some, ray.get(films), strict=True)

    def close(self) -> None:
        """End the actors."""
        for actor in (*self._stages, self._actor):
            ray.kill(actor)

    def _fill(self, seats: Sequence[_Seat], waiting: deque[Play]) -> None:
        """Begin the next episodes where none is played."""
        begun = []
        for seat in seats:
            if seat.play is None and waiting:
                seat.play = waiting.popleft()
                begun.append((seat, seat.stage.begin.remote(seat.play)))
        for seat, found in begun:
            seat.observation, seat.instruction, seat.left = ray.get(found)
            seat.actions, seat.chunks = [], 0

    def _answered(self, playing: Sequence[_Seat]) -> NDArray[np.float32]:
        observations = [self._seen(seat.observation) for seat in playing]
        seeds = [self._rollouts.noise_seed(seat.play, seat.chunks) for seat in playing if seat.play]
        answer = self._actor.act.remote(observations, [seat.instruction for seat in playing], seeds)
        chunks, seconds = ray.get(answer)
        self.latencies_s.append((len(playing), seconds))
        return chunks

    def _seen(self, observation: Observation) -> Observation:
        if not self._rollouts.blank_images:
            return observation
        return {
            name: np.zeros_like(value) if value.ndim == 3 else value for name, value in observation.items()
        }

    def _ended(self, seat: _Seat, *, success: bool) -> Played:
        assert seat.play is not None
        actions = np.concatenate(seat.actions)
        return Played(
            play=seat.play,
            instruction=seat.instruction,
            seed=self._rollouts.environment_seed(seat.play),
            success=success,
            steps=len(actions),
            actions=actions,
        )


# ---- what came out -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Success:
    """How often a task was solved, or a group of tasks."""

    task: str
    n_action_steps: int
    episodes: int
    successes: int
    steps: float
    """Mean number of actions of the episodes that were solved; NaN without one."""

    @property
    def rate(self) -> float:
        """Share of the episodes."""
        return self.successes / self.episodes

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the rate."""
        return wilson(self.successes, self.episodes)


def wilson(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927), 95 % by default; (0, 1) without a trial."""
    if trials == 0:
        return 0.0, 1.0
    share, square = successes / trials, z * z
    centre = (share + square / (2 * trials)) / (1 + square / trials)
    half = z / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def successes(played: Sequence[Played]) -> list[Success]:
    """By task and number of steps, in the order in which they were played first."""
    found: dict[tuple[str, int], list[Played]] = {}
    for one in played:
        found.setdefault((one.play.task, one.play.n_action_steps), []).append(one)
    rows = []
    for (task, steps), mine in found.items():
        solved = [one.steps for one in mine if one.success]
        rows.append(
            Success(
                task=task,
                n_action_steps=steps,
                episodes=len(mine),
                successes=len(solved),
                steps=float(np.mean(solved)) if solved else math.nan,
            )
        )
    return rows


def of_groups(rows: Sequence[Success], groups: Mapping[str, str]) -> list[Success]:
    """The same of each group of tasks, and of all tasks under "all".

    All tasks of an evaluation have as many episodes, so a group's rate is the mean of its tasks'. Its
    interval is a little wide, as it takes the episodes for those of one task.
    """
    members: dict[tuple[str, int], list[Success]] = {}
    for row in rows:
        for group in ([groups[row.task]] if row.task in groups else []) + ["all"]:
            members.setdefault((group, row.n_action_steps), []).append(row)
    found = []
    for (group, steps), mine in members.items():
        solved = sum(row.successes for row in mine)
        lengths = math.fsum(row.steps * row.successes for row in mine if row.successes)
        found.append(
            Success(
                task=group,
                n_action_steps=steps,
                episodes=sum(row.episodes for row in mine),
                successes=solved,
                steps=lengths / solved if solved else math.nan,
            )
        )
    return found


def film(frames: Sequence[NDArray[np.uint8]], *, fps: int) -> bytes:
    """Pictures (h, w, 3) as an mp4 file that browsers play (AV1, whose encoder is free of the GPL)."""
    height, width = frames[0].shape[:2]
    times = max(math.ceil(FILM_PX / max(height, width)), 1)
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        video: Any = container.add_stream("libsvtav1", rate=fps, options={"preset": "10", "crf": "30"})
        video.height, video.width = height * times // 2 * 2, width * times // 2 * 2
        video.pix_fmt = "yuv420p"
        for frame in frames:
            large = frame.repeat(times, axis=0).repeat(times, axis=1)[: video.height, : video.width]
            container.mux(
                video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(large), format="rgb24"))
            )
        container.mux(video.encode())
    return stream.getvalue()
