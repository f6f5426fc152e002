"""SIGTERM, SIGINT and SIGHUP: heard at once, obeyed where the state of a run is whole.

While training steps run, a signal is only noted; the trainer asks between two steps, when a
checkpoint can be written. Elsewhere (data, warm-up, scoring, packing) nothing would be gained by
waiting, and the signal ends the work where it stands. A thread sees to the deadline, because
Python hears nothing while a collective waits for a rank that is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

STOP_SECONDS = 9.0
"""A process that was asked to stop is gone after so long, whatever it was doing."""

TRACKER_SECONDS = 4.0
"""Of these, what the tracker may take to close."""

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Asked to stop, interrupted, and the terminal was closed."""


class Interruption(BaseException):
    """The run was asked to stop. Not an Exception: a sweep must not take it for a failed job."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM, as a shell has it."""
        return 128 + self.signum

    def for_caller(self) -> BaseException:
        """What leaves recurgolf: the exceptions that Python itself has for this."""
        if self.signum == signal.SIGINT:
            return KeyboardInterrupt("interrupted")
        return SystemExit(self.exit_code)


class Signals:
    """Listens while it is entered. In a thread other than the main one it hears nothing.

    Attributes:
        heard: the first signal that came; None so far.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        self._deferred = False

    @contextlib.contextmanager
    def listening(self, seconds: float = STOP_SECONDS) -> Iterator[Signals]:
        """Take the process's signals until the block ends; one that is ignored (nohup) stays so.

        Args:
            seconds: so long after the first signal the process is ended where it stands.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.getsignal(number) for number in WATCHED}
        if before[signal.SIGHUP] == signal.SIG_IGN:
            del before[signal.SIGHUP]
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        wakeup = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        watchdog = threading.Thread(target=_end_in_time, args=(theirs, seconds), daemon=True)
        watchdog.start()
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            ours.close()  # ends the watchdog
            watchdog.join()
            theirs.close()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is noted and nothing more; `stop_if_heard` acts on it."""
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within `deferred`: a stretch that a signal ends where it stands."""
        before, self._deferred = self._deferred, False
        try:
            self.stop_if_heard()
            yield
        finally:
            self._deferred = before

    def stop_if_heard(self) -> None:
        """Raise Interruption where a signal has come."""
        if self.heard is not None:
            raise Interruption(self.heard)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        # A second one adds nothing: a terminal sends it to every process of the group, and the
        # launcher once more to its ranks.
        if self.heard is None:
            self.heard = number
            if not self._deferred:
                raise Interruption(number)


def _end_in_time(pipe: socket.socket, seconds: float) -> None:
    """Thread: from the first watched signal on, the process has so many left."""
    while True:
        received = pipe.recv(1)
        if not received:
            return
        number = received[0]
        if number in WATCHED:
            break
    pipe.settimeout(seconds)
    deadline = time.monotonic() + seconds
    with contextlib.suppress(TimeoutError):
        while pipe.recv(1):
            pipe.settimeout(max(0.01, deadline - time.monotonic()))
        return
    with contextlib.suppress(Exception):  # nobody may be there to read it
        print(
            f"recurgolf: {signal.Signals(number).name}, and not done after {seconds:.0f} s: "
            "stopped where it stood; the last checkpoint is what there is",
            file=sys.stderr,
            flush=True,
        )
    os._exit(128 + number)


__all__ = ["STOP_SECONDS", "TRACKER_SECONDS", "Interruption", "Signals"]
