"""A policy as a service for robots, on Ray Serve: a gateway with HTTP and websocket, policies behind it.

The gateway (no torch) checks tokens, sizes and fields, and keeps sessions. There is one of it, so that any
number of replicas of the policy serve the same sessions. `BatchedPolicy` answers several robots in one pass.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import ssl
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from fastapi import FastAPI, Request, Response, WebSocket
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Histogram

from pipelines.batched_policy import BatchedPolicy
from pipelines.metrics import SERVED_SECONDS, SERVED_SESSIONS, HeldGauge
from pipelines.questions import Answer, Question, Signature, request_of
from pipelines.questions import Request as Asked
from pipelines.sessions import Sessions
from smolvla.wire import (
    JSON,
    MSGPACK,
    TOO_LARGE,
    RefusedError,
    content_type_of,
    decoded,
    encoded,
)

GATEWAY_CPUS = 0.5
WEBSOCKET_BYTES = 16 * 2**20
"""A larger message uvicorn ends the connection for, and Serve (2.60) has no setting of it."""
READY_WITHIN_S = 2.0
ANSWERS_WITHIN_S = 30.0
UNAUTHORISED, FAILED, AWAY = 401, 500, 503
BOUNDARIES_S = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]
LOOPBACK = ("127.0.0.1", "localhost", "::1")

app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a robot may ask for."""

    request_bytes: int = 12 * 2**20
    image_pixels: int = 4 * 2**20
    sessions: int = 64
    session_idle_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a policy is served."""

    name: str = "smolvla"
    """Of the application in Ray Serve."""
    route: str = "/"
    """Beginning of every address."""
    host: str = "127.0.0.1"
    port: int = 8000
    ssl_certfile: str | None = None
    """PEM file of the certificate and its chain, on the head's machine; with it and the key TLS is spoken."""
    ssl_keyfile: str | None = None
    replicas: int = 1
    num_gpus: float = 0
    """Of a replica."""
    cpus: float = 1.0
    """Of a replica."""
    max_batch: int = 8
    batch_wait_s: float = 0.005
    limits: Limits = Limits()
    token_digest: bytes | None = None
    """SHA-256 of the token that clients must show; None: they need none."""

    @property
    def url(self) -> str:
        """Where it answers on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)
        scheme = "https" if self.ssl_certfile else "http"
        return f"{scheme}://{host}:{self.port}{self.route.rstrip('/')}"


def digest_of(token: str) -> bytes:
    """What the gateway knows of the token, which itself never leaves the driver."""
    return hashlib.sha256(token.encode()).digest()


# Both stand before the gateway: Serve pickles its routes, with the names they use, where it decorates it.
def too_large(size: int, most: int) -> RefusedError:
    """The refusal of a body."""
    return RefusedError(f"the body has {size} bytes or more; at most {most} are taken", status=TOO_LARGE)


def response(message: Mapping[str, Any], kind: str, status: int = 200) -> Response:
    """A message as HTTP has it."""
    headers = {"WWW-Authenticate": "Bearer"} if status == UNAUTHORISED else None
    return Response(encoded(message, kind), status_code=status, media_type=kind, headers=headers)


@serve.deployment
@serve.ingress(app)
class Gateway:
    """All that robots talk to.

    Args:
        policy: the replicas behind.
        signature: of the policy.
        limits: of requests and sessions.
        token_digest: see `Serving`.
        number: tells this start from others.
    """

    def __init__(
        self,
        policy: DeploymentHandle,
        signature: Signature,
        limits: Limits,
        token_digest: bytes | None,
        number: str,
    ) -> None:
        self._policy, self._signature, self._limits = policy, signature, limits
        self._digest, self._number = token_digest, number
        self._sessions = Sessions(most=limits.sessions, idle_s=limits.session_idle_s)
        self._seconds = Histogram(
            SERVED_SECONDS.name,
            SERVED_SECONDS.description,
            boundaries=BOUNDARIES_S,
            tag_keys=("policy", "transport", "status"),
        )
        self._seconds.set_default_tags({"policy": signature.policy})
        self._open = HeldGauge(SERVED_SESSIONS, policy=signature.policy)
        self._open.set(0)

    @app.get("/health")
    async def health(self) -> Response:
        """Whether the process lives, and whether the policy behind it answers (else 503); needs no token."""
        try:
            await asyncio.wait_for(self._policy.ready.remote(), READY_WITHIN_S)
            ready = True
        except (TimeoutError, BackPressureError, DeploymentUnavailableError, RayActorError):
            ready = False
        said = {"alive": True, "ready": ready, "number": self._number}
        return Response(json.dumps(said), status_code=200 if ready else AWAY, media_type=JSON)

    @app.get("/metadata")
    async def metadata(self, request: Request) -> Response:
        """What the policy takes and gives, and the limits."""
        try:
            self._admit(request.headers)
        except RefusedError as refused:
            return response(refused.as_message(), JSON, refused.status)
        limits = {"request_bytes": self._limits.request_bytes, "image_pixels": self._limits.image_pixels}
        return response(self._signature.as_message() | {"limits": limits}, JSON)

    @app.post("/act")
    async def act(self, request: Request) -> Response:
        """One observation -> one chunk."""
        started, kind = time.perf_counter(), JSON
        try:
            self._admit(request.headers)
            kind = content_type_of(request.headers.get("content-type"))
            told, status = await self._told(await self._body(request), kind, started=started), 200
        except RefusedError as refused:
            told, status = refused.as_message(), refused.status
        self._note("http", status, started)
        return response(told, kind, status)

    @app.websocket("/ws")
    async def converse(self, socket: WebSocket) -> None:
        """Observations -> chunks, as often as the robot likes; the connection is its session."""
        session = f"connection {uuid.uuid4()}"
        try:
            self._admit(socket.headers)
            self._sessions.hold(session)
        except RefusedError as refused:
            await socket.send_denial_response(response(refused.as_message(), JSON, refused.status))
            return
        await socket.accept()
        try:
            while (event := await socket.receive())["type"] == "websocket.receive":
                await self._converse_once(socket, event, session)
        finally:
            self._sessions.release(session)
            self._open.set(len(self._sessions))

    async def _converse_once(self, socket: WebSocket, event: Mapping[str, Any], session: str) -> None:
        """A binary message is msgpack, a text is JSON; the answer comes in the same form."""
        started = time.perf_counter()
        text = event.get("text")
        kind, body = (MSGPACK, event.get("bytes") or b"") if text is None else (JSON, text.encode())
        try:
            if len(body) > self._limits.request_bytes:
                raise too_large(len(body), self._limits.request_bytes)
            told, status = await self._told(body, kind, started=started, connection=session), 200
        except RefusedError as refused:
            told, status = refused.as_message(), refused.status
        self._note("websocket", status, started)
        answer = encoded({"status": status} | told, kind)
        await (socket.send_bytes(answer) if kind == MSGPACK else socket.send_text(answer.decode()))

    async def _told(
        self, body: bytes, kind: str, *, started: float, connection: str | None = None
    ) -> dict[str, Any]:
        """The answer to a request."""
        asked = await asyncio.to_thread(self._understood, body, kind)
        if connection and asked.session:
            raise RefusedError("the connection is the session", field="session")
        session = connection or asked.session
        question = self._continued(asked, session)
        if session:
            self._sessions.admit(session)  # before work is done for it
        answer = await self._ask(question)
        if not np.isfinite(answer.actions).all():
            raise RefusedError("the policy's actions are no finite numbers", status=FAILED)
        if session:
            self._sessions.keep(session, answer.normalised)
        return {
            "actions": answer.actions[: asked.n_action_steps],
            "seed": asked.question.seed,
            "seconds": time.perf_counter() - started,
            "batch": answer.batch,
            "policy": self._signature.policy,
            "version": self._signature.version,
        }

    def _understood(self, body: bytes, kind: str) -> Asked:
        """In a thread: decoding images takes milliseconds."""
        return request_of(
            decoded(body, kind),
            self._signature,
            max_pixels=self._limits.image_pixels,
            drawn_seed=secrets.randbits(63),
        )

    def _continued(self, asked: Asked, session: str | None) -> Question:
        """The question, with what the session knows of the chunk before."""
        if asked.executed is None:
            return asked.question
        if session is None:
            raise RefusedError(f"{asked.executed} needs a session beside it", field="executed")
        left_over = self._sessions.left_over(session, asked.executed)
        return replace(asked.question, left_over=left_over, left_over_is_normalised=True)

    async def _ask(self, question: Question) -> Answer:
        try:
            return await self._policy.act.remote(question)
        except BackPressureError:
            raise RefusedError("more questions wait than may; ask again later", status=AWAY) from None
        except (DeploymentUnavailableError, RayActorError):
            raise RefusedError(
                "the policy's process ended, a new one starts; ask again", status=AWAY
            ) from None

    def _admit(self, headers: Mapping[str, str]) -> None:
        if self._digest is None:
            return
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest_of(shown.strip()), self._digest):
            raise RefusedError(
                "a valid token is needed, as Authorization: Bearer <token>", status=UNAUTHORISED
            )

    async def _body(self, request: Request) -> bytes:
        """All of it, or nothing more once it is too much."""
        most, told = self._limits.request_bytes, request.headers.get("content-length", "")
        if told.isdecimal() and int(told) > most:
            raise too_large(int(told), most)
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_large(len(body), most)
        return bytes(body)

    def _note(self, transport: str, status: int, started: float) -> None:
        tags = {"transport": transport, "status": str(status)}
        self._seconds.observe(time.perf_counter() - started, tags=tags)
        self._open.set(len(self._sessions))


# ---- starting and ending it -------------------------------------------------------------------------------


def start(serving: Serving, fetch: Callable[[], Path], signature: Signature) -> None:
    """Serve until `stop`; returns when the first answer can be given.

    Args:
        serving: where and how.
        fetch: gives the policy's folder on any node.
        signature: of that policy.

    Raises:
        ValueError: the address is taken, or Ray Serve answers at another one on this cluster.
        RuntimeError: the policy cannot be loaded.
    """
    if not serve.status().proxies:
        _check_free(serving)
    http: dict[str, Any] = {"host": serving.host, "port": serving.port}
    http |= {"ssl_certfile": serving.ssl_certfile, "ssl_keyfile": serving.ssl_keyfile}
    serve.start(proxy_location="HeadOnly", http_options=http)
    number = secrets.token_hex(8)
    serve.run(
        _application(serving, fetch, signature, number),
        name=serving.name,
        route_prefix=serving.route,
        logging_config={"enable_access_log": False},  # a line a chunk, for every robot
    )
    if not _answers(serving.url, number):
        serve.delete(serving.name)
        raise ValueError(
            f"port {serving.port}: the policy does not answer at {serving.url}; Ray Serve runs on this "
            "cluster at another address or with another certificate, which it keeps until it is shut down"
        )


def stop(serving: Serving) -> None:
    """End the application, and Ray Serve with it if there is no other one."""
    serve.delete(serving.name)
    if not serve.status().applications:
        serve.shutdown()


def _application(
    serving: Serving, fetch: Callable[[], Path], signature: Signature, number: str
) -> serve.Application:
    policy = cast("Any", BatchedPolicy).options(
        num_replicas=serving.replicas,
        ray_actor_options={"num_cpus": serving.cpus, "num_gpus": serving.num_gpus},
        max_ongoing_requests=2 * serving.max_batch
        + 2,  # a batch in work, one that gathers, questions of health
        max_queued_requests=2 * serving.limits.sessions,
        max_constructor_retry_count=2,
    )
    gateway = cast("Any", Gateway).options(
        ray_actor_options={"num_cpus": GATEWAY_CPUS},
        max_ongoing_requests=4 * serving.limits.sessions + 64,  # a connection counts as long as it lasts
    )
    threads = None if serving.num_gpus else max(int(serving.cpus), 1)
    return gateway.bind(
        policy.bind(
            fetch,
            signature,
            max_batch=serving.max_batch,
            batch_wait_s=serving.batch_wait_s,
            threads=threads,
        ),
        signature,
        serving.limits,
        serving.token_digest,
        number,
    )


def _check_free(serving: Serving) -> None:
    family = socket.AF_INET6 if ":" in serving.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the proxy's server does
        try:
            probe.bind((serving.host, serving.port))
        except OSError as error:
            raise ValueError(f"host {serving.host} port {serving.port}: {error.strerror}") from None


def _answers(url: str, number: str) -> bool:
    """Whether this start answers at `url`, within a while."""
    trusting = ssl.create_default_context()  # the number says who answers; the certificate has another name
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    deadline = time.monotonic() + ANSWERS_WITHIN_S
    while time.monotonic() < deadline:
        with (
            contextlib.suppress(urllib.error.URLError, OSError, ValueError),
            urllib.request.urlopen(f"{url}/health", timeout=5, context=trusting) as answer,
        ):
            return json.load(answer)["number"] == number
        time.sleep(0.2)
    return False
