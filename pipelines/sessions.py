"""What a server keeps of each robot: its last chunk, from which real-time chunking goes on."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smolvla.wire import RefusedError

UNKNOWN, TOO_MANY = 409, 429


@dataclass
class _Session:
    used: float
    chunk: NDArray[np.float32] | None = None
    held: bool = False


class Sessions:
    """Chunks by session; one that nobody used for `idle_s` is forgotten, one that is held is not.

    Args:
        most: sessions at once.
        idle_s: seconds.
        clock: seconds that never go back.
    """

    def __init__(self, *, most: int, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._idle_s, self._clock = most, idle_s, clock
        self._sessions: dict[str, _Session] = {}

    def __len__(self) -> int:
        self._forget()
        return len(self._sessions)

    def hold(self, name: str) -> None:
        """Open a session that lives until `release`: that of a connection.

        Raises:
            RefusedError: 429, there are as many as may be.
        """
        self._opened(name).held = True

    def release(self, name: str) -> None:
        """Forget a session."""
        self._sessions.pop(name, None)

    def left_over(self, name: str, executed: int) -> NDArray[np.float32] | None:
        """What a session's robot has not executed of its last chunk, normalised (steps, A); None: nothing.

        Raises:
            RefusedError: 409, no chunk is kept.
        """
        self._forget()
        session = self._sessions.get(name)
        if session is None or session.chunk is None:
            raise RefusedError(
                f"{executed} of which chunk? The session has none: it is new, or was idle for more than "
                f"{self._idle_s:g} s; ask without it, or send left_over",
                status=UNKNOWN,
                field="executed",
            )
        session.used = self._clock()
        return session.chunk[executed:] if executed < len(session.chunk) else None

    def keep(self, name: str, chunk: NDArray[np.float32]) -> None:
        """Remember a session's newest chunk, normalised (H, A).

        Raises:
            RefusedError: 429, it would be a new session, and there are as many as may be.
        """
        session = self._opened(name)
        session.chunk = chunk

    def admit(self, name: str) -> None:
        """Open a session if it is not open.

        Raises:
            RefusedError: 429, there are as many as may be.
        """
        self._opened(name)

    def _opened(self, name: str) -> _Session:
        self._forget()
        if name not in self._sessions and len(self._sessions) >= self._most:
            oldest = min((s.used for s in self._sessions.values() if not s.held), default=math.inf)
            wait = self._idle_s - (self._clock() - oldest)
            hint = f"; the next one ends in {wait:.0f} s" if math.isfinite(wait) else ""
            raise RefusedError(
                f"{self._most} are open, no more may be{hint}", status=TOO_MANY, field="session"
            )
        session = self._sessions.setdefault(name, _Session(self._clock()))
        session.used = self._clock()
        return session

    def _forget(self) -> None:
        now = self._clock()
        for name, session in list(self._sessions.items()):
            if not session.held and now - session.used > self._idle_s:
                del self._sessions[name]
