"""A robot's side of a served policy: needs numpy, msgpack and websockets, neither torch nor Ray.

    with RobotClient("http://gpu-machine:8000", token=os.environ["SMOLVLA_TOKEN"]) as policy:
        print(policy.metadata()["cameras"])
        actions = policy.act({"observation.images.top": image, "observation.state": state, "task": "open it"})

The connection is the session: for real-time chunking it is enough to say how much of the last chunk was
executed.
"""

import asyncio
import json
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Coroutine, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from .features import CAMERA_PREFIX
from .wire import MSGPACK, RefusedError, array, decoded, encoded

AWAY = 503
RETRY_S = 0.2
MOST_BYTES = 16 * 2**20
"""Of an answer."""


class RobotClient:
    """One robot's connection to a served policy. Not to be shared by threads.

    Args:
        url: http://host:port of the server, or https:// where it has a certificate or a proxy before it.
        token: what the server was started with.
        timeout_s: for which a request is tried: a connection that broke is made again meanwhile.
        jpeg_quality: 1 to 100 makes JPEGs of images before they are sent (needs Pillow); None sends pixels.
        ca_file: PEM file with the certificates to trust, where a server signed its own; None: the system's.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float = 10.0,
        jpeg_quality: int | None = None,
        ca_file: str | None = None,
    ) -> None:
        scheme, _, rest = url.rstrip("/").partition("://")
        if scheme not in ("http", "https") or not rest:
            raise ValueError(f"url {url!r} is no http:// or https:// address")
        self._url, self._socket_url = f"{scheme}://{rest}", f"{scheme.replace('http', 'ws')}://{rest}/ws"
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout_s, self._jpeg_quality = timeout_s, jpeg_quality
        self._tls = ssl.create_default_context(cafile=ca_file) if scheme == "https" else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._socket: ClientConnection | None = None
        self._session_has_chunk = False
        self._chunk: NDArray[Any] | None = None
        self.answer: dict[str, Any] = {}
        """All of the last answer: actions, seed, seconds in the server, policy and version."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and with it the session."""
        self._disconnect()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    def _disconnect(self) -> None:
        socket, self._socket, self._session_has_chunk = self._socket, None, False
        if socket is not None:
            self._awaited(socket.close())

    def _awaited(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """What it returns or raises, in a thread that answers the server's pings between two requests, too.

        One thread for all of a connection: where TLS is read in one and written in another (websockets.sync),
        it may get stuck in reading, and nothing can end that.
        """
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_forever, args=(self._loop,), daemon=True, name="robot").start()
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C, too
            future.cancel()
            raise

    def metadata(self) -> dict[str, Any]:
        """What the policy takes and gives: cameras, widths, names, chunk_size, fps.

        Raises:
            RefusedError: the token is not the server's.
            ConnectionError: nobody answers.
        """
        request = urllib.request.Request(f"{self._url}/metadata", headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s, context=self._tls) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise _refusal(error.read(), error.code) from None
        except OSError as error:
            raise ConnectionError(f"{self._url} does not answer: {error}") from None

    def act(
        self,
        observation: Mapping[str, Any],
        *,
        executed: int | None = None,
        inference_delay: int | None = None,
        execution_horizon: int | None = None,
        n_action_steps: int | None = None,
        seed: int | None = None,
    ) -> NDArray[np.float32]:
        """Actions (n, A) in the dataset's units for what the robot sees.

        Args:
            observation: cameras as arrays (height, width, 3) uint8 RGB or as JPEG or PNG bytes,
                `observation.state`, `task`.
            executed: actions of the last chunk that were executed when the observation was made; the new
                chunk continues the others. None: it stands by itself.
            inference_delay: actions that will be executed until the answer is there; they are held fast.
            execution_horizon: actions from which on the new chunk is free.
            n_action_steps: to be sent; None: the whole chunk.
            seed: of the noise; None: the server draws one.

        Raises:
            RefusedError: the request is wrong; names the field.
            ConnectionError: no answer within `timeout_s`.
        """
        guidance = {"inference_delay": inference_delay, "execution_horizon": execution_horizon}
        wanted: dict[str, Any] = {"n_action_steps": n_action_steps, "seed": seed}
        wanted["observation"] = {name: self._sent(name, value) for name, value in observation.items()}
        deadline = time.monotonic() + self._timeout_s
        while True:
            try:
                told = self._exchanged(wanted | self._continuing(executed, guidance), deadline)
                break
            except ssl.SSLCertVerificationError as error:  # it will not become another one
                raise ConnectionError(f"{self._url}: {error.verify_message}") from None
            except (OSError, ConnectionClosed, InvalidHandshake) as error:
                self._disconnect()
                if time.monotonic() + RETRY_S > deadline:
                    reason = str(error) or type(error).__name__
                    raise ConnectionError(
                        f"{self._url} gave no answer within {self._timeout_s:g} s: {reason}"
                    ) from None
                time.sleep(RETRY_S)
        told["actions"] = array(told["actions"], field="actions")
        self.answer, self._chunk, self._session_has_chunk = told, told["actions"], True
        return self._chunk.copy()  # what comes from bytes is read-only

    def _continuing(self, executed: int | None, guidance: Mapping[str, int | None]) -> dict[str, Any]:
        """How the chunk goes on; a session that is new since a connection broke is told all of it."""
        if executed is None or self._session_has_chunk:
            return {"executed": executed, **guidance}
        if self._chunk is None:
            raise ValueError(f"executed {executed}: there is no chunk yet")
        left_over = self._chunk[executed:]
        return {"left_over": left_over, **guidance} if len(left_over) else {}

    def _exchanged(self, message: Mapping[str, Any], deadline: float) -> dict[str, Any]:
        asked = encoded({name: value for name, value in message.items() if value is not None}, MSGPACK)
        body = self._awaited(self._answer(asked, deadline))
        told = decoded(body if isinstance(body, bytes) else body.encode(), MSGPACK)
        if told["status"] == AWAY:
            raise ConnectionError(told["error"])
        if told["status"] != 200:
            raise _refused(told)
        return told

    async def _answer(self, asked: bytes, deadline: float) -> bytes | str:
        socket = await self._connected(deadline)
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                await socket.send(asked)
                return await socket.recv()
        except BaseException:  # a late answer must not be taken for the next one
            self._socket, self._session_has_chunk = None, False
            socket.transport.abort()
            raise

    async def _connected(self, deadline: float) -> ClientConnection:
        if self._socket is None:
            try:
                self._socket = await connect(
                    self._socket_url,
                    ssl=self._tls,
                    additional_headers=self._headers,
                    open_timeout=max(deadline - time.monotonic(), RETRY_S),
                    close_timeout=1,
                    max_size=MOST_BYTES,
                    compression=None,  # images do not get smaller, and chunks are small
                )
            except InvalidStatus as error:
                if error.response.status_code == AWAY:
                    raise
                raise _refusal(bytes(error.response.body or b""), error.response.status_code) from None
        return self._socket

    def _sent(self, name: str, value: Any) -> Any:
        if not name.startswith(CAMERA_PREFIX) and not _is_image(value):
            return np.asarray(value, dtype=np.float32) if not isinstance(value, str) else value
        if self._jpeg_quality is None or isinstance(value, bytes):
            return value
        return _jpeg(value, self._jpeg_quality)


def _forever(loop: asyncio.AbstractEventLoop) -> None:
    """Until somebody stops it."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def _is_image(value: Any) -> bool:
    return isinstance(value, bytes) or getattr(value, "ndim", 0) == 3


def _jpeg(image: Any, quality: int) -> bytes:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def _refusal(body: bytes, status: int) -> Exception:
    """What a response of HTTP says."""
    try:
        return _refused(json.loads(body))
    except (ValueError, KeyError, TypeError):
        return ConnectionError(f"HTTP status {status}: {body[:200].decode(errors='replace')}")


def _refused(told: Mapping[str, Any]) -> RefusedError:
    error, field = told["error"], told["field"]
    return RefusedError(error.removeprefix(f"{field}: "), status=told["status"], field=field)
