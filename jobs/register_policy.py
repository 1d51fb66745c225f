"""Make a checkpoint a registered policy that MLflow loads and serves, under an alias.

    ray job submit --working-dir . -- python jobs/register_policy.py --run_id 3f1c... --name towels

The run's checkpoint of the lowest validation loss is taken, of a run without validation its newest, or with
--step that one. Its weights go to MLflow, so what is served does not depend on the run's folder. The last
line is JSON.
"""

import base64
import io
import json
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.models import ModelSignature
from mlflow.types import DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType, Array, ColSpec, TensorSpec
from PIL import Image

from jobs import tracking
from jobs.command_line import parsed, refusals
from jobs.environment import ROOT
from jobs.policies import verified
from jobs.served_policy import ANSWER, ARTIFACT, TASK
from jobs.tracking import TrackingOptions
from pipelines.files import joined, parted
from pipelines.progress import folder_name
from pipelines.run_storage import PRETRAINED
from smolvla import SmolVLAPolicy
from smolvla.features import STATE

REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "torch", "torchvision", "transformers")


@dataclass(frozen=True, kw_only=True)
class RegisterPolicy:
    run_id: str = ""
    """MLflow's id of the training run."""
    name: str = ""
    """Of the registered model; every call adds a version."""
    step: int | None = None
    """Of the checkpoint; None: the best, or the newest of a run that was not validated."""
    ema: bool = False
    """Whether the averaged weights are taken."""
    alias: str = "champion"
    """Points to the new version from now on; empty: none does."""
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def __post_init__(self) -> None:
        for flag in ("run_id", "name"):
            if not getattr(self, flag):
                raise ValueError(f"{flag} is missing")


def main(job: RegisterPolicy) -> None:
    """Find the checkpoint, check it, log it, register it."""
    uri = job.tracking.completed().uri
    with refusals(), tempfile.TemporaryDirectory(prefix="register-policy-") as work:
        tracking.check_reachable(uri)
        client = tracking.client_of(uri)
        training = run_of(client, job.run_id)
        checkpoint = checkpoint_of(training, job.step)
        policy = verified(checkpoint, Path(work)) / (f"{PRETRAINED}_ema" if job.ema else PRETRAINED)
        if not policy.is_dir():
            raise ValueError(f"ema {job.ema}: {checkpoint} has no {policy.name}")
        mlflow.set_tracking_uri(uri)
        with mlflow.start_run(
            experiment_id=training.info.experiment_id,
            run_name=f"register {job.name}",
            tags=lineage(training, checkpoint),
        ):
            logged = log_policy(policy, name=job.name)
    version_of = mlflow.register_model(f"models:/{logged.model_id}", job.name)
    for tag, value in lineage(training, checkpoint).items():
        client.set_model_version_tag(job.name, version_of.version, tag, value)
    if job.alias:
        client.set_registered_model_alias(job.name, job.alias, version_of.version)
    print(
        json.dumps(
            {
                "name": job.name,
                "version": version_of.version,
                "alias": job.alias,
                "checkpoint": checkpoint,
                "uri": f"models:/{job.name}" + (f"@{job.alias}" if job.alias else f"/{version_of.version}"),
                "page": f"{uri}/#/models/{job.name}/versions/{version_of.version}",
            }
        ),
        flush=True,
    )


def run_of(client: MlflowClient, run_id: str) -> Run:
    """The training run.

    Raises:
        ValueError: the server does not know it.
    """
    try:
        return client.get_run(run_id)
    except mlflow.MlflowException as error:
        raise ValueError(f"run_id {run_id!r}: {error.message}") from None


def checkpoint_of(training: Run, step: int | None) -> str:
    """Address of the chosen checkpoint.

    Raises:
        ValueError: the run has none.
    """
    tags = training.data.tags
    chosen = tags.get("best_checkpoint") or tags.get("latest_checkpoint")
    if chosen is None:
        raise ValueError(f"run_id {training.info.run_id!r} has no checkpoint")
    if step is None:
        return chosen
    return joined(parted(chosen)[0], folder_name(step))


def lineage(training: Run, checkpoint: str) -> dict[str, str]:
    """Tags that lead from a registered policy back to what it was trained by and on."""
    return {
        "training_run_id": training.info.run_id,
        "training_run_name": training.info.run_name or "",
        "checkpoint_uri": checkpoint,
        "dataset_fingerprint": training.data.tags.get("dataset_fingerprint", ""),
        "git_commit": training.data.tags.get("git_commit", ""),
    }


def log_policy(folder: Path, *, name: str) -> Any:
    """Log a policy's folder as a model that MLflow can load, with its signature and an example."""
    policy = SmolVLAPolicy.from_pretrained(folder)
    signature, example = described(policy)
    return mlflow.pyfunc.log_model(
        name=name,
        python_model=str(ROOT / "jobs/served_policy.py"),
        artifacts={ARTIFACT: str(folder)},
        code_paths=[str(ROOT / "smolvla")],
        signature=signature,
        input_example=example,
        pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
        model_type="robot_policy",
    )


def described(policy: SmolVLAPolicy) -> tuple[ModelSignature, tuple[pd.DataFrame, dict[str, int]]]:
    """What a policy takes and gives under its robot's names, and an observation that it takes."""
    config = policy.config
    back = {theirs: ours for ours, theirs in policy.processor.files.rename.items()}
    cameras = {back.get(name, name): config.input_features[name]["shape"] for name in config.camera_names}
    inputs: list[ColSpec | TensorSpec] = [ColSpec(AnyType(), name) for name in cameras]
    inputs += [ColSpec(Array(DataType.double), STATE), ColSpec(DataType.string, TASK)]
    params = ParamSchema(
        [
            ParamSpec("seed", DataType.long, 0),
            ParamSpec("n_action_steps", DataType.long, config.n_action_steps),
        ]
    )
    outputs = Schema([ColSpec(Array(Array(DataType.double)), ANSWER)])
    width = config.input_features[STATE]["shape"][0]
    example = {name: [png(*shape[1:])] for name, shape in cameras.items()}
    example |= {STATE: [[0.0] * width], TASK: ["say what the robot shall do"]}
    signature = ModelSignature(inputs=Schema(inputs), outputs=outputs, params=params)
    return signature, (pd.DataFrame(example), {"seed": 0, "n_action_steps": config.n_action_steps})


def png(height: int, width: int) -> str:
    """A grey picture in base64."""
    stream = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), 128, np.uint8)).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


if __name__ == "__main__":
    main(parsed(RegisterPolicy, sys.argv[1:]))
