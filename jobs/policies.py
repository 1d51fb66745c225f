"""Policies by name: a folder, a checkpoint, a registered model; and what is known of their making."""

import functools
import hashlib
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.dataset import filesystem_of
from pipelines.files import exists, joined, parted, read_json
from pipelines.run_storage import PRETRAINED, STEPS, RunStorage
from smolvla.configuration import SmolVLAConfig
from smolvla.features import EMPTY_CAMERA

REGISTERED = "models:/"
RECORD = "run.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy, and where it comes from."""

    path: str
    """As it was given."""
    checkpoint: str = ""
    """Address of the checkpoint it is of, if it is of one."""
    record: dict[str, Any] | None = None
    """What the run of the checkpoint is: `identity`, `mlflow_run_id`."""
    held: str = ""
    """Where it is loaded from if the checkpoint may be gone: see pipelines/holding.py."""
    ema: bool = False
    tracking_uri: str = ""
    """Of the registry."""

    @property
    def step(self) -> int | None:
        """Of the training."""
        found = re.fullmatch(f"{STEPS}(\\d+)", parted(self.checkpoint)[1]) if self.checkpoint else None
        return int(found[1]) if found else None

    @property
    def training_run_id(self) -> str | None:
        """MLflow's id of the run that trained it."""
        return self.record["mlflow_run_id"] if self.record else None

    @property
    def name(self) -> str:
        """Short, for people."""
        if not self.checkpoint:
            return parted(self.path.rstrip("/"))[1]
        run, step = parted(self.checkpoint)
        return f"{parted(run)[1]} {step}"

    def held_out(self, fingerprint: str) -> list[int] | None:
        """The episodes of a dataset that its training held out; None if it was trained on others."""
        identity = self.record["identity"] if self.record else {}
        if identity.get("dataset_fingerprint") != fingerprint:
            return None
        episodes = (identity.get("validation") or {}).get("episodes") or [[]]
        return list(episodes[0])

    def fetch(self) -> Callable[[], Path]:
        """Gives the policy's folder on the node where it is called."""
        address = self.held or self.checkpoint or self.path
        return functools.partial(
            _fetched, address, ema=self.ema, tracking_uri=self.tracking_uri, held=bool(self.held)
        )


def found(path: str, *, ema: bool, tracking_uri: str) -> Policy:
    """Find the policy of the flag `policy.path` and what is known of it.

    Raises:
        ValueError: there is none.
    """
    if not path:
        raise ValueError("policy.path is missing")
    if path.startswith(REGISTERED):
        if ema:
            raise ValueError(f"policy.ema: {path} is registered and has one set of weights")
        return Policy(path=path, tracking_uri=tracking_uri)
    address = path.rstrip("/")
    if "://" not in address:
        address = str(Path(address).expanduser().absolute())
    if not _has(address, WEIGHTS):
        return _of_checkpoint(path, address, ema=ema)
    parent, name = parted(address)
    if name in (PRETRAINED, f"{PRETRAINED}_ema") and parted(parent)[1].startswith(STEPS):
        return _of_checkpoint(path, parent, ema=name != PRETRAINED)
    if ema:
        raise ValueError(f"policy.ema: {path} is no checkpoint of a run, which may have averaged weights")
    return Policy(path=address)


def held(path: str, *, checkpoint: str, ema: bool) -> Policy:
    """The policy of a checkpoint that is held in `path`, and need not be there any more.

    Raises:
        ValueError: it is not held.
    """
    known = _of_checkpoint(path, path, ema=ema)
    return replace(known, path=checkpoint, checkpoint=checkpoint, record=_record(checkpoint), held=path)


def _of_checkpoint(path: str, address: str, *, ema: bool) -> Policy:
    if not _has(address, f"{PRETRAINED}/{WEIGHTS}"):
        raise ValueError(
            f"policy.path {path}: neither a policy ({WEIGHTS}) nor a checkpoint ({PRETRAINED}/{WEIGHTS})"
        )
    if ema and not _has(address, f"{PRETRAINED}_ema/{WEIGHTS}"):
        raise ValueError(f"policy.ema: {path} has no averaged weights")
    return Policy(path=path, checkpoint=address, record=_record(address), ema=ema)


def _record(checkpoint: str) -> dict[str, Any] | None:
    """What the run of a checkpoint says of itself."""
    record = filesystem_of(joined(parted(checkpoint)[0], RECORD))
    return read_json(*record) if exists(*record) else None


def _has(address: str, name: str) -> bool:
    return exists(*filesystem_of(joined(address, name)))


def _fetched(address: str, *, ema: bool, tracking_uri: str, held: bool) -> Path:
    """The folder with config.json and the weights, on this node."""
    if address.startswith(REGISTERED):
        import mlflow  # seconds that folders do without

        place = mlflow.artifacts.download_artifacts(address, tracking_uri=tracking_uri)
        return Path(place) / "artifacts/policy"
    if not parted(address)[1].startswith(STEPS):
        return Path(address)
    work = _kept(parted(address)[0]) if held else None
    return verified(address, work) / (f"{PRETRAINED}_ema" if ema else PRETRAINED)


def _kept(run: str) -> Path:
    """The node's folder for what a run holds: all actors there share one download, the next replaces it."""
    return Path.home() / ".cache/smolvla_policies" / hashlib.sha256(run.encode()).hexdigest()[:16]


def verified(checkpoint: str, work: Path | None = None) -> Path:
    """A checkpoint's folder on this node, as its manifest says; one of a store is fetched into `work`.

    Raises:
        ValueError: it is not there, or not what its manifest says.
    """
    run, name = parted(checkpoint)
    remote = "://" in checkpoint
    folder = (work or Path(tempfile.mkdtemp(prefix="policy-"))) if remote else Path(run)
    storage = RunStorage(folder=folder, uri=run if remote else "")
    if reason := storage.problem(name):
        raise ValueError(f"checkpoint {checkpoint}: {reason}")
    return storage.folder / name


def seen_cameras(config: SmolVLAConfig, rename: Mapping[str, str]) -> dict[str, str]:
    """What the robot calls a camera -> what the policy calls it; those that are always empty are left out.

    Args:
        config: the policy's.
        rename: of its processor, from the robot's names to the policy's.
    """
    back = {theirs: ours for ours, theirs in rename.items()}
    empty = {EMPTY_CAMERA.format(number) for number in range(config.empty_cameras)}
    return {back.get(name, name): name for name in config.camera_names if name not in empty}
