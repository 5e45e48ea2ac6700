"""The process that holds the model: load, test itself, work, drain. `worker.child` starts it."""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from types import FrameType

import torch
from prometheus_client import start_http_server

from safelatent import logs, traces
from safelatent.connecting import connect
from safelatent.defaults import model_id
from safelatent.jobs import Jobs
from safelatent.store import Store
from worker import self_test, tasks
from worker import settings as environment
from worker.checks import Checks
from worker.checks.sd_checker import SDChecker
from worker.engine import Engine
from worker.families import UnusableModel
from worker.families.stable_diffusion import StableDiffusion
from worker.observing import Observer
from worker.pulse import Pulse
from worker.settings import Settings
from worker.slots import ProgressReporter, Slots
from worker.supervisor import NAME, POISONED, UNUSABLE

log = logging.getLogger("worker")


class Wishes:
    """What signals have asked for: to end, and to end now.

    They are taken only from the moment on at which there can be work. Before that a signal does
    what it does to any process: it ends it at once, wherever it is.
    """

    def __init__(self) -> None:
        self.to_end = threading.Event()
        self.to_end_now = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.take)

    def take(self, number: int, frame: FrameType | None) -> None:
        (self.to_end_now if self.to_end.is_set() else self.to_end).set()


def main() -> int:
    settings = environment.read()
    if settings is None:
        return UNUSABLE
    logs.configure(settings.log_level, settings.log_format)
    traces.configure("safelatent-worker")
    try:
        engine = load(settings)
        self_test.run(engine)
    except UnusableModel as error:
        print(f"safelatent worker: {error}", file=sys.stderr)
        return UNUSABLE
    work(engine, settings)
    return 0


def load(settings: Settings) -> Engine:
    """The model on its device, with the checks that its checkpoint brings."""
    device, dtype = settings.torch_device(), settings.torch_dtype()
    try:
        family = StableDiffusion(
            settings.model, model_id(settings.model), device, dtype, settings.model_revision or None
        )
        checks = SDChecker.of(family.folder, family.model.revision, device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise UnusableModel(f"not enough memory on {device} for {settings.model}") from error
    family.model.checks = [check.name for check in checks]
    return Engine(family, Checks(checks), settings.max_rows)


def work(engine: Engine, settings: Settings) -> None:
    """Serve until asked to end, then drain: running generations end, no new one starts.

    What still runs after the grace period, or at a second signal, is handed back.
    """
    observer = Observer(settings.log_prompts)
    if settings.metrics_port:
        port, registry = settings.metrics_port, observer.metrics.registry
        try:
            start_http_server(port, settings.metrics_host, registry)
        except OSError as error:
            print(
                f"safelatent worker: cannot serve metrics on port {port}: {error.strerror}",
                file=sys.stderr,
            )
            sys.exit(UNUSABLE)
    connection = connect(settings.redis_url, socket_connect_timeout=2)
    tasks.desk = tasks.Desk(engine, Store(settings.store_url), Jobs(connection), observer)
    name = os.environ.get(NAME) or uuid.uuid4().hex[:12]
    slots = Slots(settings.slots, engine.family.model, tasks.desk, name)
    tasks.desk.is_sure = slots.is_sure
    reporter = ProgressReporter(connection, tasks.desk.meter, slots.is_sure)
    engine.after_step = reporter.after_step
    observer.watch(engine)
    observer.watch_slots(
        settings.slots, lambda: sum(s.work_in_hand is not None for s in slots.slots)
    )
    wishes = Wishes()
    pulse = Pulse.of_environment()
    pulse.beat(is_idle=True)  # from now on we can hold jobs
    engine.before_turn = pulse.beat

    drained = threading.Event()
    thread = threading.Thread(target=engine.run, args=(drained,), name="engine")
    thread.start()
    slots.start()
    device = settings.torch_device()
    log.info("warm: %s on %s, %d slots", engine.family.model.id, device, settings.slots)
    deadline = float("inf")
    while slots.are_busy:
        if engine.poisoned is not None:
            log.error("the device computes no more: %s", engine.poisoned)
            slots.hand_back(is_counted=True)
            _leave(POISONED)
        if wishes.to_end_now.is_set() or time.monotonic() > deadline:
            log.warning("%d generations are handed back", slots.hand_back(is_counted=False))
            _leave(0)
        if wishes.to_end.is_set() and deadline == float("inf"):
            log.info("draining")
            slots.close()
            deadline = time.monotonic() + settings.grace_s
        (wishes.to_end_now if wishes.to_end.is_set() else wishes.to_end).wait(0.05)
    slots.join()
    drained.set()
    thread.join()
    reporter.stop()


def _leave(code: int) -> None:
    """End without waiting for threads: what they still hold is nobody's any more."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
