"""Evaluations of a run's checkpoints beside its training: the flags, and what of them is refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jobs import evaluate_smolvla
from jobs.evaluate_smolvla import EvaluateSmolVLA, JudgedData, JudgedPolicy
from jobs.tracking import TrackingOptions
from jobs.training_data import readable
from pipelines.dataset import open_dataset
from smolvla.configuration import SmolVLAConfig


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Evaluations beside the training; the flags are those of jobs/evaluate_smolvla.py."""

    every: int = 0
    """Steps, a multiple of checkpoint.every; the last step is evaluated, too. 0: nothing is."""
    env: str = ""
    """metaworld, gymnasium, or package.module:Class of one's own. Empty: nothing is played."""
    tasks: list[str] = field(default_factory=list)
    """Of the environment."""
    episodes: int = 50
    """Of each task."""
    n_action_steps: list[int] = field(default_factory=list)
    """Actions of a chunk that are executed before the next one, one or several; empty: the policy's."""
    seed: int = 0
    """Of the worlds, and of the policy's noise; not the run's, so that runs can be compared."""
    size: int | None = None
    """Height and width in pixels of what the policy sees; None: those of the data."""
    max_steps: int | None = None
    """Actions after which an episode has failed; None: the environment's limit."""
    num_environments: int = 8
    """Played at once."""
    videos: int = 2
    """Films of successes, and as many of failures, for each task."""
    dataset: JudgedData = field(default_factory=JudgedData)
    """Recorded frames, measured offline."""
    ema: bool = False
    """Whether the averaged weights are evaluated, with ema_decay."""
    use_gpu: bool = False
    cpus_per_policy: float = 1.0
    resource: str = ""
    """Name of a resource of Ray's (`ray start --resources`) of nodes that are there for evaluations: they run
    on those, whatever the training leaves elsewhere. Empty: on what the training leaves."""
    timeout_s: float = 3600.0
    """Of one evaluation; then it is ended and counts as failed."""
    at_end: bool = True
    """Whether the job waits for the evaluation of its last checkpoint when the training has ended."""

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"eval.every {self.every} is negative")
        if self.timeout_s <= 0:
            raise ValueError(f"eval.timeout_s {self.timeout_s} is not positive")
        if not self.every:
            return
        if not (self.env or self.dataset.path):
            raise ValueError(
                f"eval.every {self.every}: nothing to evaluate on; eval.env names an environment, "
                "eval.dataset.path recorded episodes"
            )
        self.evaluation(JudgedPolicy(), TrackingOptions())

    def evaluation(self, policy: JudgedPolicy, tracking: TrackingOptions) -> EvaluateSmolVLA:
        """The job that evaluates a checkpoint.

        Raises:
            ValueError: names the flag and the value.
        """
        own = ("every", "ema", "timeout_s", "at_end")
        shared = {name: value for name, value in vars(self).items() if name not in own}
        try:
            return EvaluateSmolVLA(policy=policy, tracking=tracking, ends_with_input=True, **shared)
        except ValueError as error:
            raise ValueError(f"eval.{error}") from None


def check(
    options: EvalOptions,
    config: SmolVLAConfig,
    *,
    rename: Mapping[str, str],
    checkpoint_every: int,
    has_average: bool,
) -> None:
    """Refuse what no evaluation could be made of.

    Raises:
        ValueError: names the flag and the value.
    """
    if not options.every:
        return
    if options.every % checkpoint_every:
        raise ValueError(
            f"eval.every {options.every} is not a multiple of checkpoint.every {checkpoint_every}"
        )
    if options.ema and not has_average:
        raise ValueError("eval.ema: there is no average of the weights without ema_decay")
    job = options.evaluation(JudgedPolicy(), TrackingOptions())
    try:
        if job.env:
            evaluate_smolvla.check_rollouts(job, config, rename)
        if path := job.dataset.path:
            dataset = open_dataset(readable(path, flag="dataset.path"))
            evaluate_smolvla.check_dataset(dataset, config, rename, path=path)
    except ValueError as error:
        raise ValueError(f"eval.{error}") from None


def check_cluster(options: EvalOptions) -> None:
    """Refuse what the cluster can never give.

    Raises:
        ValueError: names the flags, what they need and what there is.
    """
    if options.every and not options.resource:  # a node with the resource may still come
        try:
            evaluate_smolvla.check_cluster(options.evaluation(JudgedPolicy(), TrackingOptions()))
        except ValueError as error:
            raise ValueError(f"eval.{error}") from None
