"""However a job ends, its MLflow run says so; a notice to end is used to do what is left to do first."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import ray
import ray.exceptions
from mlflow.exceptions import MlflowException

from jobs.tracking import TrackedRun
from pipelines.board import Wish

LAST_POINTS_S = 1.5  # in which the writer, which ships every second, delivers the last ones of a stopped job
LOOK_EVERY_S = 0.2
ORPHAN_WAITS_S = 2.0  # `ray job stop` signals parent and child; a second signal ends the child at once
FAREWELL_S = 15.0  # for telling MLflow


@contextlib.contextmanager
def truthful_end(run: TrackedRun, board: Any) -> Iterator[None]:
    """Whatever ends the job, the MLflow run says so. SIGKILL alone leaves it RUNNING.

    SIGTERM and SIGINT let the workers save at their next step, for as long as the job is left alive; a second
    one ends it at once.

    Args:
        run: the job's.
        board: handle of the `pipelines.board.Board` that the workers look at.
    """
    with noticed(_Saving(run, board)) as hand_over:
        try:
            yield
        except BaseException:
            hand_over()
            _tell(run, "FAILED")
            raise
        else:
            hand_over()
            _tell(run, "FINISHED")


def _tell(run: TrackedRun, status: str) -> None:
    """How the job ended is no worse for a server that is away."""
    try:
        run.finish(status)
    except MlflowException as error:
        print(f"MLflow does not know that the run is {status}: {str(error)[:300]}", flush=True)
        print("when it is back, the same command tells it", flush=True)


@contextlib.contextmanager
def noticed(farewell: Callable[[threading.Event], None]) -> Iterator[Callable[[], None]]:
    """On SIGTERM or SIGINT, call `farewell` in a thread and end the process; a second one ends it at once.

    Args:
        farewell: gets an event that is set when the work has ended by itself.

    Yields:
        To be called when the work has ended: after a notice, the process ends there.
    """
    stopping = _Stopping(farewell)
    before = {number: signal.signal(number, stopping.notice) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping.hand_over
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_input() -> None:
    """End this process as by SIGTERM when its standard input is closed, which the end of its parent does.

    However the parent ends: nothing else survives a SIGKILL.
    """
    threading.Thread(target=_until_input_ends, daemon=True).start()


def _until_input_ends() -> None:
    while os.read(0, 1024):  # not through sys.stdin, whose lock this thread would hold when Python ends
        pass
    time.sleep(ORPHAN_WAITS_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(FAREWELL_S)
    os._exit(128 + signal.SIGTERM)


class _Stopping:
    """The thread that ends the job after a notice.

    Not the handler, and not by an exception: the signal may come while Ray's own code runs, which can swallow
    it.
    """

    def __init__(self, farewell: Callable[[threading.Event], None]) -> None:
        self._farewell, self._number = farewell, 0
        self._noticed, self._work_ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._end, daemon=True)
        self._thread.start()

    def notice(self, number: int, _: FrameType | None) -> None:
        if self._noticed.is_set():
            os._exit(128 + number)
        self._number = number
        self._noticed.set()

    def hand_over(self) -> None:
        """The work has ended; if that was wished for, so does this process, here."""
        self._work_ended.set()
        if self._noticed.is_set():
            self._thread.join()

    def _end(self) -> None:
        self._noticed.wait()
        try:
            self._farewell(self._work_ended)
        finally:
            os._exit(128 + self._number)


class _Saving:
    """The farewell of a training job."""

    def __init__(self, run: TrackedRun, board: Any) -> None:
        self._run, self._board = run, board

    def __call__(self, workers_ended: threading.Event) -> None:
        # The wish is sent before anything else is waited for: `ray job stop` kills after 3 s by default, and
        # MLflow may not answer at all.
        before, wanted = self._wished()
        with contextlib.suppress(MlflowException):
            self._run.finish("KILLED")
        print("told to stop: saving first", flush=True)
        step = self._saved(wanted, workers_ended)
        if step > before:
            print(f"stopped, saved at step {step}; the same command continues the run", flush=True)
        else:
            print(f"stopped, not saved: the workers had ended; the last saved step is {step}", flush=True)
        time.sleep(LAST_POINTS_S)

    def _wished(self) -> tuple[int, int]:
        """Have the run saved; returns the last step that was saved, and the first that will do.

        A save that is under way is of an earlier step, and what was trained since would be lost with it.
        """
        self._told("want", Wish.SAVE_AND_STOP, otherwise=None)
        saved, beats = self._told("saved_step", otherwise=0), self._told("beats", otherwise=[])
        return saved, max([saved + 1, *(beat.step for beat in beats)])

    def _saved(self, wanted: int, workers_ended: threading.Event) -> int:
        """The last step that was saved, when that is the wanted one or nobody can save any more."""
        while not workers_ended.wait(LOOK_EVERY_S):
            if (step := self._told("saved_step", otherwise=wanted)) >= wanted:
                return step
        return self._told("saved_step", otherwise=0)

    def _told(self, method: str, *arguments: Any, otherwise: Any) -> Any:
        """What the board says; where Ray has ended, nobody answers."""
        try:
            return ray.get(getattr(self._board, method).remote(*arguments))
        except ray.exceptions.RayError:
            return otherwise
