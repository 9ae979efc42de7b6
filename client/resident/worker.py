"""One order at a time, on one thread, while callers wait on theirs."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field

from client.resident.desk import Answer, Desk
from client.resident.trainer_pb2 import Order
from fedgraft.errors import RunError, StoppedError
from fedgraft.resident_model import let_go, resident_base
from fedgraft.stopping import stopping_when

log = logging.getLogger(__name__)
_STEP_SECONDS = 30.0
"""How long a caller waits for work that was given up to reach its next step."""


class BusyError(RunError):
    """Another order is at work, and somebody waits for its answer."""


@dataclass
class Job:
    """An order on its way.

    Attributes:
        order: what is asked.
        given_up: set by the caller that goes away.
        done: set when there is an answer, or none will come.
        answer: what was made of it; None where it was stopped.
    """

    order: Order
    given_up: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    answer: Answer | None = None


class Worker:
    """Answers orders one after the other on the thread that calls `work`.

    Args:
        desk: answers them.
        idle_seconds: after so long without an order the base and all data are let go.
    """

    def __init__(self, desk: Desk, idle_seconds: float) -> None:
        self.desk = desk
        self._idle_seconds = idle_seconds
        self._changed = threading.Condition()
        self._job: Job | None = None
        self._stopping = False

    @property
    def busy(self) -> bool:
        """Whether an order is at work."""
        return self._job is not None

    def submit(self, order: Order) -> Job:
        """Hand in an order.

        Raises:
            BusyError: another one is at work; or nothing is done here any more.
        """
        job = Job(order)
        with self._changed:
            if self._job is not None and self._job.given_up.is_set():
                self._changed.wait_for(lambda: self._job is None, _STEP_SECONDS)
            if self._job is not None or self._stopping:
                raise BusyError("the trainer is at work on another order")
            self._job = job
            self._changed.notify_all()
        return job

    def work(self) -> bool:
        """Answer orders until `stop`; return whether a new process should take over."""
        while True:
            with self._changed:
                there = self._changed.wait_for(
                    lambda: self._job is not None or self._stopping, self._idle_seconds
                )
                job = self._job
                if job is None and self._stopping:
                    return False
            if not there:
                self._unload()
            elif job is not None:
                self._answer(job)
                if _exhausted(job):
                    return True

    def stop(self) -> None:
        """Let work end at its next step, and take no more."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _answer(self, job: Job) -> None:
        try:
            with stopping_when(lambda: self._stopping or job.given_up.is_set()):
                job.answer = self.desk.answer(job.order)
        except StoppedError as error:
            log.warning("stopped: %s", error)
        finally:
            with self._changed:
                self._job = None
                if _exhausted(job):  # in the same breath: nobody is let in who would wait for ever
                    self._stopping = True
                self._changed.notify_all()
            job.done.set()

    def _unload(self) -> None:
        if resident_base():
            let_go()
            log.info("base and data let go after %g s without an order", self._idle_seconds)


def _exhausted(job: Job) -> bool:
    """Whether memory ran out, so that a new process should take over."""
    return job.answer is not None and job.answer.out_of_memory
