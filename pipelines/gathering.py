"""Questions that come one by one, answered together: those that come while others are answered are the next.

Ray Serve's own `serve.batch` (2.60) cuts a batch whenever its time to wait is over, also while one is being
answered: a question that comes in the middle of a pass then waits for that pass, and afterwards is answered
alone, as is the next. Knows no Ray.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


class Gathering(Generic[Q, A]):
    """Questions of one event loop, in the order in which they came.

    Args:
        answered: gives an answer for each of some questions; never called while it runs.
        most: questions at once.
        wait_s: how long a question may wait for others when it could be answered.
    """

    def __init__(
        self, answered: Callable[[list[Q]], Awaitable[Sequence[A]]], *, most: int, wait_s: float
    ) -> None:
        self._answered, self._most, self._wait_s = answered, most, wait_s
        self._waiting: deque[tuple[Q, asyncio.Future[A], float]] = deque()
        self._full = asyncio.Event()
        self._working: asyncio.Task[None] | None = None

    async def answer(self, question: Q) -> A:
        """The answer to one question; raises what answering it and its companions raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[A] = loop.create_future()
        self._waiting.append((question, future, loop.time()))
        if len(self._waiting) >= self._most:
            self._full.set()
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        """Answer until nobody waits."""
        while self._waiting:
            await self._others()
            count = min(self._most, len(self._waiting))
            taken = [self._waiting.popleft() for _ in range(count)]
            if len(self._waiting) < self._most:
                self._full.clear()
            asked = [(question, future) for question, future, _ in taken if not future.done()]
            if asked:  # some may have gone meanwhile
                await self._one(asked)
        self._working = None

    async def _others(self) -> None:
        """Wait until there are as many as may be, or the first has waited as long as it may."""
        left = self._waiting[0][2] + self._wait_s - asyncio.get_running_loop().time()
        if left > 0 and not self._full.is_set():
            try:
                await asyncio.wait_for(self._full.wait(), left)
            except TimeoutError:
                return

    async def _one(self, asked: Sequence[tuple[Q, "asyncio.Future[A]"]]) -> None:
        try:
            answers = await self._answered([question for question, _ in asked])
            if len(answers) != len(asked):
                raise RuntimeError(f"{len(answers)} answers to {len(asked)} questions")
        except Exception as error:  # noqa: BLE001 it is for those who asked
            for _, future in asked:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), answer in zip(asked, answers, strict=True):
            if not future.done():
                future.set_result(answer)
