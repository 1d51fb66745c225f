"""An evaluation as an MLflow run, a child of the training's that gets its results as curves, and as text."""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.exceptions
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException

from jobs import lineage, tracking
from jobs.ending import noticed
from jobs.policies import Policy
from jobs.tracking import TrackedRun, TrackingOptions
from pipelines import drawing, offline
from pipelines.dataset import EpisodeDataset
from pipelines.offline import Answers, Report
from pipelines.rollouts import Played, Success
from pipelines.validation import HeldOut, slug


def success_table(rows: Sequence[Success], groups: Sequence[Success], latency: Mapping[str, float]) -> str:
    """Success rates of tasks and groups of tasks with their 95 % intervals, as text."""
    lines = [
        f"{'task':32} {'steps':>5}  {'solved':>9}  {'rate':>6}  {'95 % interval':>15}  actions until solved"
    ]
    for row in (*rows, *groups):
        low, high = row.interval
        until = "-" if math.isnan(row.steps) else f"{row.steps:.0f}"
        lines.append(
            f"{row.task:32} {row.n_action_steps:5}  {row.successes:4}/{row.episodes:<4}  {row.rate:6.1%}  "
            f"{low:6.1%} - {high:6.1%}  {until}"
        )
    lines.append(
        f"a chunk takes {latency['p50']:.0f} ms (p99 {latency['p99']:.0f} ms) for "
        f"{latency['environments']:.1f} environments"
    )
    return "\n".join(lines)


def offline_table(found: Sequence[Report]) -> str:
    """Errors by task and number of the action beside the two answers that need no policy, as text."""
    lines = []
    for report in found:
        lines.append(f"{report.name}: {report.frames} frames, loss {report.loss:.4f}")
        for kind, title in (("mae", "mean absolute error"), ("rmse", "root mean square error")):
            lines.append(f"  {title:24} {'step':>5} {'policy':>10} {'mean action':>12} {'hold last':>10}")
            for ahead, errors in report.policy[kind].items():
                for number, name in enumerate(report.dimensions):
                    others = (side[kind][ahead][number] for side in (report.mean_action, report.hold_last))
                    mean, held = others
                    lines.append(f"  {name:24} {ahead:>5} {errors[number]:10.4g} {mean:12.4g} {held:10.4g}")
    return "\n".join(lines)


class Recorder:
    """What MLflow is told, by names that begin with the group; curves go to the run of the training, too."""

    def __init__(self, run: TrackedRun, policy: Policy, parent: str | None, *, group: str) -> None:
        self._run, self._policy, self._parent, self._group = run, policy, parent, group
        self._broke_off: Callable[[], None] | None = None

    @contextlib.contextmanager
    def breaking_off(self, tell: Callable[[], None]) -> Iterator[None]:
        """What `tell` has to say is said if the work in this block fails, or the process is told to end."""
        self._broke_off = tell
        try:
            yield
        except ray.exceptions.RayError:  # a world or the policy fell
            tell()
            raise
        finally:
            self._broke_off = None

    def killed(self) -> None:
        """Tell what was done until now, from another thread."""
        self._run.finish("KILLED")  # first of all: little time may be left
        if self._broke_off:
            self._broke_off()

    def offline(self, found: Sequence[Report], held_out: HeldOut, answers: Answers) -> None:
        """Losses and errors as metrics, all of it as a table, the chunks as a picture."""
        whole = found[0]
        values = {"loss": whole.loss, "frames": float(whole.frames)}
        values |= {f"relative_mae/{ahead}": value for ahead, value in whole.relative().items()}
        # numbered as in training: the beginnings of two tasks' texts may be one
        values |= {
            f"loss/task_{number}_{slug(report.name)}": report.loss for number, report in enumerate(found[1:])
        }
        self._metrics(values)
        client, run_id = self._run.client, self._run.run_id
        client.log_dict(run_id, {report.name: asdict(report) for report in found}, "offline.json")
        client.log_text(run_id, offline_table(found), "offline.txt")
        chunks = offline.predictions(held_out, answers)
        figure = drawing.action_chunks(chunks, title=f"{self._policy.name}: {whole.frames} frames")
        client.log_figure(run_id, figure, "plots/actions.png")

    def played(
        self,
        played: Sequence[Played],
        rows: Sequence[Success],
        groups: Sequence[Success],
        latency: Mapping[str, float],
        *,
        complete: bool,
    ) -> None:
        """Rates as metrics, every episode in a table; no point of a curve if the evaluation broke off."""
        rates, own = {}, {}
        named = [*((row.task, row) for row in rows), *((slug(row.task), row) for row in groups)]
        for task, row in named:
            low, high = row.interval
            name = f"{task}/n{row.n_action_steps}"
            rates[f"success_rate/{name}"] = row.rate
            own |= {f"success_low/{name}": low, f"success_high/{name}": high}
            own |= {f"actions_until_solved/{name}": row.steps, f"episodes/{name}": row.episodes}
        if complete:
            self._metrics(rates)
        else:
            own |= rates
        own |= {f"chunk_ms/{name}": value for name, value in latency.items()}
        self._log(self._run.run_id, own)
        table = {
            "task": [one.play.task for one in played],
            "n_action_steps": [one.play.n_action_steps for one in played],
            "episode": [one.play.number for one in played],
            "seed": [one.seed for one in played],
            "success": [one.success for one in played],
            "actions": [one.steps for one in played],
        }
        self._run.client.log_table(self._run.run_id, table, "episodes.json")
        self._run.client.log_text(self._run.run_id, success_table(rows, groups, latency), "success.txt")

    def film(self, played: Played, content: bytes) -> None:
        """A film as an artifact that MLflow's pages play."""
        play, result = played.play, "solved" if played.success else "failed"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{result}_episode_{play.number:03}.mp4"
            path.write_bytes(content)
            self._run.client.log_artifact(
                self._run.run_id, str(path), f"videos/{play.task}/n_action_steps_{play.n_action_steps}"
            )

    def _metrics(self, values: dict[str, float]) -> None:
        """For the run of this evaluation, and as a curve over steps for that of the training."""
        self._log(self._run.run_id, values)
        if self._parent and self._policy.step is not None:
            self._log(self._parent, values)

    def _log(self, run_id: str, values: dict[str, float]) -> None:
        now, step = int(time.time() * 1000), self._policy.step or 0
        real = {f"{self._group}/{name}": value for name, value in values.items() if not math.isnan(value)}
        self._run.client.log_batch(
            run_id, metrics=[Metric(name, value, now, step) for name, value in real.items()]
        )


@contextlib.contextmanager
def tracked(
    options: TrackingOptions,
    policy: Policy,
    *,
    params: Mapping[str, Any],
    datasets: Sequence[EpisodeDataset],
    blind: bool = False,
) -> Iterator[tuple[TrackedRun, Recorder]]:
    """The MLflow run of an evaluation; it ends as the evaluation ends.

    That of a policy that was shown black pictures has names of its own, so that no curve of the training
    mixes what it can with what it can without its eyes.
    """
    parent = _known_parent(options, policy)
    tags = tracking.source_tags("jobs/evaluate_smolvla.py") | {"kind": "evaluation", "policy": policy.path}
    if policy.checkpoint:
        tags |= {"checkpoint_uri": policy.checkpoint, "checkpoint_step": str(policy.step)}
    if parent:
        tags |= {"training_run_id": parent, "mlflow.parentRunId": parent}
    origins = [lineage.origin(dataset) for dataset in datasets]
    tags |= lineage.tags(datasets, origins)
    name = f"evaluate {policy.name}" + (", blind" if blind else "")
    run = tracking.start_run(options.uri, experiment=options.experiment, name=name, params=params, tags=tags)
    for dataset, origin in zip(datasets, origins, strict=True):
        tracking.log_dataset(run, dataset, origin=origin, context="evaluation")
    print(f"MLflow run: {run.link}", flush=True)
    recorder = Recorder(run, policy, parent, group="eval_blind" if blind else "eval")
    with noticed(lambda _: recorder.killed()) as hand_over:
        try:
            yield run, recorder
        except BaseException:
            hand_over()
            run.finish("FAILED")
            raise
        hand_over()
        run.finish("FINISHED")


def _known_parent(options: TrackingOptions, policy: Policy) -> str | None:
    """The training's run, if this server has it."""
    if policy.training_run_id is None:
        return None
    try:
        return tracking.client_of(options.uri).get_run(policy.training_run_id).info.run_id
    except MlflowException:
        return None
