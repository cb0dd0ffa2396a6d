"""Objects in processes of their own, of which one works at a time while the others are stopped.

What is compared here brings its own pools of threads: OpenMP's, ONNX Runtime's, TBB's. In one process, and even in
several, the threads of the one that has just worked go on spinning for some milliseconds, on the cores that the next
one is timed on. A stopped process spins nowhere.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

_DIES_WITH_ITS_PARENT = 1
"""``PR_SET_PDEATHSIG`` of Linux: a stopped process would outlive a parent that was killed."""

_SECONDS_TO_END = 10


class WorkerError(RuntimeError):
    """What was called in the worker raised; the message is the last line, :attr:`details` the traceback."""

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message, details)
        self.message, self.details = message, details

    def __str__(self) -> str:
        return self.message


class Worker:
    """The object that ``make()`` makes, in a fresh process on ``threads`` cores, stopped except during a call.

    What the process writes to its standard output goes to standard error. Use as a context manager.
    """

    def __init__(self, threads: int, make: Callable[[], object], timeout: float | None = None) -> None:
        """``timeout`` is in seconds, for making the object. Raises what :meth:`call` does."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        with _on_cores(threads):
            self._process.start()
        theirs.close()
        try:
            self._receive(timeout)
        except BaseException:
            self.close()
            raise
        self._signal(signal.SIGSTOP)

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        """``method`` of the object with ``arguments``.

        Raises :class:`WorkerError` if that raises or the process ends, and ``TimeoutError`` after ``timeout`` seconds,
        when the process is ended.
        """
        self._signal(signal.SIGCONT)
        try:
            with suppress(BrokenPipeError):  # that its process has ended, receiving tells
                self._connection.send((method, arguments))
            return self._receive(timeout)
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process: it ends by itself when nobody is at the other end, or is ended if it takes long."""
        self._signal(signal.SIGCONT)
        self._connection.close()
        self._process.join(_SECONDS_TO_END)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def _receive(self, timeout: float | None) -> Any:
        try:
            if not self._connection.poll(timeout):
                self._process.kill()
                raise TimeoutError(f"no answer within {timeout:g} s")
            worked, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise WorkerError(f"its process ended with exit code {self._process.exitcode}", "") from None
        if not worked:
            raise WorkerError(*value)
        return value


def apart(threads: int, function: Callable[..., object], *arguments: Any, timeout: float | None = None) -> Any:
    """``function(*arguments)`` in a fresh process on ``threads`` cores; raises what :meth:`Worker.call` does."""
    with Worker(threads, _Given(function)) as worker:
        return worker.call("__call__", *arguments, timeout=timeout)


class _Given:
    def __init__(self, value: object) -> None:
        self._value = value

    def __call__(self) -> object:
        return self._value


@contextmanager
def _on_cores(count: int) -> Iterator[None]:
    """Processes started inside run on the first ``count`` cores of those that this one may use."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def _serve(connection: Connection, make: Callable[[], object]) -> None:
    ctypes.CDLL(None).prctl(_DIES_WITH_ITS_PARENT, signal.SIGKILL)
    os.dup2(2, 1)
    made = _answer(connection, make)
    if made is None:
        return
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        _answer(connection, getattr(made, method), *arguments, keep=False)


def _answer(connection: Connection, function: Callable[..., object], *arguments: Any, keep: bool = True) -> object:
    """Send what ``function`` returns, or only that it has returned if that is to be kept here; or what it raised."""
    try:
        value = function(*arguments)
    except Exception as error:
        text = str(error).strip()
        connection.send(
            (False, (f"{type(error).__name__}: {text.splitlines()[0] if text else ''}", traceback.format_exc()))
        )
        return None
    connection.send((True, None if keep else value))
    return value
