r"""Serve a policy to robots until told to stop: HTTP and websocket, several robots answered in one pass.

    python jobs/serve_policy.py --policy.path /runs/towels/step_000020000
    ray job submit --working-dir . -- python jobs/serve_policy.py --policy.path models:/towels@champion \
        --use_gpu true --host 0.0.0.0 --token_env SMOLVLA_TOKEN \
        --ssl_certfile /tls/tls.crt --ssl_keyfile /tls/tls.key

docs/serving.md has the protocol; `smolvla.client.RobotClient` speaks it.
"""

import json
import os
import re
import signal
import ssl
import sys
import threading
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import mlflow
import ray

from jobs import command_line, policies, tracking
from jobs.policies import REGISTERED, Policy, seen_cameras
from jobs.tracking import TrackingOptions
from jobs.training_data import readable
from pipelines import serving
from pipelines.dataset import EpisodeDataset, open_dataset
from pipelines.files import parted
from pipelines.questions import Signature
from pipelines.serving import GATEWAY_CPUS, LOOPBACK, Limits, Serving, digest_of
from smolvla.configuration import SmolVLAConfig
from smolvla.features import ACTION, STATE
from smolvla.processing import SmolVLAProcessor

MEGABYTE = 2**20
LEAST_TOKEN_CHARS = 16


@dataclass(frozen=True, kw_only=True)
class ServedOptions:
    path: str = ""
    """A checkpoint of a run (step_*), a folder with config.json and weights, or models:/name@alias."""
    ema: bool = False
    """Whether a checkpoint's averaged weights are taken."""


@dataclass(frozen=True, kw_only=True)
class DescribingData:
    path: str = ""
    """Episode dataset that the policy was trained on: clients are told its names of state and action, and its
    frames a second. Empty: they are not."""


@dataclass(frozen=True, kw_only=True)
class ServePolicy:
    """The flags of jobs/serve_policy.py."""

    policy: ServedOptions = field(default_factory=ServedOptions)
    dataset: DescribingData = field(default_factory=DescribingData)
    host: str = "127.0.0.1"
    """Address to listen on, of the machine where Ray's head runs; beyond loopback a token is needed."""
    port: int = 8000
    route: str = "/"
    """Beginning of every address, to serve several policies on one cluster."""
    name: str = "smolvla"
    """Of the application in Ray Serve."""
    token_env: str = ""
    """NAME of the environment variable that holds the clients' token; empty: they need none."""
    ssl_certfile: str = ""
    """PEM file with the server's certificate and its chain, on the machine where Ray's head runs: https://
    and wss:// are served instead of http:// and ws://."""
    ssl_keyfile: str = ""
    """PEM file with the certificate's key, not encrypted."""
    replicas: int = 1
    """Processes with the policy; sessions are kept before them."""
    use_gpu: bool = False
    """One GPU for each replica."""
    cpus_per_replica: float = 1.0
    max_batch: int = 8
    """Robots that one forward pass answers."""
    batch_wait_ms: float = 5.0
    """For which a robot that asks first waits for others."""
    max_request_mb: float = 12.0
    """Of 2**20 bytes; a websocket message ends at 16 in any case."""
    max_image_pixels: int = 4 * MEGABYTE
    max_sessions: int = 64
    """Robots whose last chunk is kept, connections among them."""
    session_idle_s: float = 60.0
    """After which a session without a connection is forgotten."""
    tracking: TrackingOptions = field(default_factory=TrackingOptions)

    def __post_init__(self) -> None:
        for name in ("replicas", "max_batch", "max_image_pixels", "max_sessions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        for name in ("cpus_per_replica", "session_idle_s", "max_request_mb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} is not positive")
        if self.batch_wait_ms < 0:
            raise ValueError(f"batch_wait_ms {self.batch_wait_ms} is negative")
        if not 0 < self.port < 2**16:
            raise ValueError(f"port {self.port} is not within 1..{2**16 - 1}")
        if not re.fullmatch(r"/|(/[A-Za-z0-9._-]+)+", self.route):
            raise ValueError(f"route {self.route!r} is neither / nor like /towels")


@dataclass(frozen=True)
class Prepared:
    """All inputs, checked; nothing is started yet."""

    policy: Policy
    signature: Signature
    serving: Serving


def prepare(job: ServePolicy) -> Prepared:
    """Check everything that can be wrong.

    Raises:
        ValueError: names the flag and the value.
    """
    digest = _token_digest(job)
    _check_certificate(job)
    path = pinned(job.policy.path, job.tracking.uri)
    policy = policies.found(path, ema=job.policy.ema, tracking_uri=job.tracking.uri)
    folder = policy.fetch()()
    config = SmolVLAConfig.from_pretrained(folder)
    processor = SmolVLAProcessor.from_pretrained(folder, config)
    dataset = open_dataset(readable(job.dataset.path, flag="dataset.path")) if job.dataset.path else None
    return Prepared(policy, signature_of(policy, config, processor, dataset), serving_of(job, digest))


def serving_of(job: ServePolicy, digest: bytes | None) -> Serving:
    """The flags as `pipelines.serving` has them."""
    limits = Limits(
        request_bytes=int(job.max_request_mb * MEGABYTE),
        image_pixels=job.max_image_pixels,
        sessions=job.max_sessions,
        session_idle_s=job.session_idle_s,
    )
    return Serving(
        name=job.name,
        route=job.route,
        host=job.host,
        port=job.port,
        ssl_certfile=job.ssl_certfile or None,
        ssl_keyfile=job.ssl_keyfile or None,
        replicas=job.replicas,
        num_gpus=1 if job.use_gpu else 0,
        cpus=job.cpus_per_replica,
        max_batch=job.max_batch,
        batch_wait_s=job.batch_wait_ms / 1000,
        limits=limits,
        token_digest=digest,
    )


def _token_digest(job: ServePolicy) -> bytes | None:
    if not job.token_env:
        if job.host not in LOOPBACK:
            raise ValueError(
                f"host {job.host} can be reached from other machines: token_env must name the environment "
                "variable with the token that clients show"
            )
        return None
    token = os.environ.get(job.token_env, "")
    if len(token) < LEAST_TOKEN_CHARS:
        found = "is not set" if not token else f"holds {len(token)} characters"
        raise ValueError(
            f"token_env {job.token_env}: the variable {found}; a token has {LEAST_TOKEN_CHARS} or more"
        )
    return digest_of(token)


def _check_certificate(job: ServePolicy) -> None:
    """Load it as the server will, which would not say what is wrong with it."""
    files = {"ssl_certfile": job.ssl_certfile, "ssl_keyfile": job.ssl_keyfile}
    if not any(files.values()):
        return

    def password() -> str:
        raise ValueError(f"ssl_keyfile {job.ssl_keyfile} is encrypted, and nobody is there to be asked")

    for name, path in files.items():
        if not path:
            raise ValueError(f"{name} is missing; ssl_certfile and ssl_keyfile go together")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{name} {path}: there is no such file, or it may not be read")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(job.ssl_certfile, job.ssl_keyfile, password)
    except ssl.SSLError as error:
        said = (error.reason or str(error)).lower().replace("_", " ")
        raise ValueError(f"ssl_certfile {job.ssl_certfile}, ssl_keyfile {job.ssl_keyfile}: {said}") from None


def pinned(path: str, tracking_uri: str) -> str:
    """A registered policy by its version: an alias may move while replicas come and go.

    Raises:
        ValueError: there is no such policy or alias.
    """
    name, at, alias = path.removeprefix(REGISTERED).partition("@")
    if not path.startswith(REGISTERED) or not at:
        return path
    try:
        found = tracking.client_of(tracking_uri).get_model_version_by_alias(name, alias)
    except mlflow.MlflowException as error:
        raise ValueError(f"policy.path {path}: {error.message}") from None
    return f"{REGISTERED}{name}/{found.version}"


def signature_of(
    policy: Policy, config: SmolVLAConfig, processor: SmolVLAProcessor, dataset: EpisodeDataset | None
) -> Signature:
    """What clients are told of a policy; cameras have their robot's names, not those of the base checkpoint.

    Raises:
        ValueError: the dataset is another robot's.
    """
    cameras = {
        ours: tuple(config.input_features[name]["shape"][1:])
        for ours, name in seen_cameras(config, processor.files.rename).items()
    }
    widths = {name: processor.files.features[name]["shape"][0] for name in (STATE, ACTION)}
    names = {name: _names(dataset, name, width) for name, width in widths.items()}
    title, version = title_of(policy)
    record = policy.record["identity"] if policy.record else {}
    return Signature(
        policy=title,
        version=version,
        cameras=cameras,
        state_width=widths[STATE],
        action_width=widths[ACTION],
        chunk_size=config.chunk_size,
        n_action_steps=config.n_action_steps,
        fps=record.get("policy_fps") or (dataset.fps if dataset else None),
        state_names=names[STATE],
        action_names=names[ACTION],
    )


def title_of(policy: Policy) -> tuple[str, str]:
    """Name and version, for people and metrics."""
    if policy.path.startswith(REGISTERED):
        name, _, version = policy.path.removeprefix(REGISTERED).rpartition("/")
        return name, version
    if policy.step is not None:
        return parted(parted(policy.checkpoint)[0])[1], f"{policy.step}{' ema' if policy.ema else ''}"
    return policy.name, ""


def _names(dataset: EpisodeDataset | None, name: str, width: int) -> tuple[str, ...]:
    if dataset is None:
        return ()
    feature = dataset.features.get(name, {"shape": [0]})
    if feature["shape"] != [width]:
        raise ValueError(
            f"dataset.path {dataset.uri}: its {name} has shape {feature['shape']}, the policy's [{width}]"
        )
    return tuple(feature.get("names") or ())


def check_cluster(job: ServePolicy) -> None:
    """Refuse what the cluster can never give; Ray Serve would wait for it in silence.

    Raises:
        ValueError: names the flags, what they need and what there is.
    """
    have = ray.cluster_resources()
    if job.use_gpu and have.get("GPU", 0) < job.replicas:
        raise ValueError(
            f"use_gpu: replicas {job.replicas} need {job.replicas} GPUs, the cluster has {have.get('GPU', 0)}"
        )
    need = job.replicas * job.cpus_per_replica + GATEWAY_CPUS
    if have.get("CPU", 0) < need:
        raise ValueError(
            f"replicas {job.replicas} at cpus_per_replica {job.cpus_per_replica} and the gateway need {need} "
            f"CPUs, the cluster has {have.get('CPU', 0)}"
        )


def main(job: ServePolicy) -> None:
    """Check, start, say where, wait for the end."""
    job = replace(job, tracking=job.tracking.completed())
    ended = threading.Event()

    def end(*_: int | FrameType | None) -> None:
        ended.set()

    with command_line.refusals():
        prepared = prepare(job)
    command_line.start_ray()
    with command_line.refusals():
        check_cluster(job)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)  # before it starts: what Serve runs would stay without its driver
        serving.start(prepared.serving, prepared.policy.fetch(), prepared.signature)
    told: dict[str, Any] = {"url": prepared.serving.url} | prepared.signature.as_message()
    print(json.dumps(told), flush=True)
    ended.wait()
    serving.stop(prepared.serving)
    print(f"{prepared.serving.url} is no longer served", flush=True)


if __name__ == "__main__":
    main(command_line.parsed(ServePolicy, sys.argv[1:]))
