"""`python -m worker`: load, test itself, work, drain."""

import logging
import signal
import sys
import threading
from types import FrameType

import torch
from prometheus_client import start_http_server
from pydantic import ValidationError
from redis import Redis

from safelatent import logs, traces
from safelatent.defaults import model_id
from safelatent.jobs import Jobs
from safelatent.store import Store
from worker import self_test, tasks
from worker.checks import Checks
from worker.checks.sd_checker import SDChecker
from worker.engine import Engine
from worker.families import UnusableModel
from worker.families.stable_diffusion import StableDiffusion
from worker.observing import Observer
from worker.settings import Settings
from worker.slots import ProgressReporter, Slots

log = logging.getLogger("worker")


def main() -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: _stop(stop, frame))
    try:
        settings = Settings()  # type: ignore[call-arg]
        logs.configure(settings.log_level, settings.log_format)
        traces.configure("safelatent-worker")
        engine = load(settings)
        self_test.run(engine)
        work(engine, settings, stop)
    except UnusableModel as error:
        print(f"safelatent worker: {error}", file=sys.stderr)
        return 1
    except ValidationError as error:
        for wrong in error.errors():
            name = "_".join(map(str, wrong["loc"])).upper()
            print(f"safelatent worker: setting {name}: {wrong['msg']}", file=sys.stderr)
        return 1
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


def work(engine: Engine, settings: Settings, stop: threading.Event) -> None:
    """Serve until `stop`, then drain: running generations end, no new one starts."""
    observer = Observer(settings.log_prompts)
    if settings.metrics_port:
        port, registry = settings.metrics_port, observer.metrics.registry
        try:
            start_http_server(port, settings.metrics_host, registry)
        except OSError as error:
            sys.exit(f"safelatent worker: cannot serve metrics on port {port}: {error.strerror}")
    connection: Redis = Redis.from_url(settings.redis_url, socket_connect_timeout=2)
    tasks.desk = tasks.Desk(engine, Store(settings.store_url), Jobs(connection), observer)
    reporter = ProgressReporter(connection, tasks.desk.meter)
    engine.after_step = reporter.after_step
    observer.watch(engine)
    slots = Slots(settings.slots, engine.family.model, tasks.desk)
    observer.watch_slots(
        settings.slots, lambda: sum(s.work_in_hand is not None for s in slots.slots)
    )

    drained = threading.Event()
    thread = threading.Thread(target=engine.run, args=(drained,), name="engine")
    thread.start()
    slots.start()
    log.info("warm: %s on %s, %d slots", engine.family.model.id, settings.device, settings.slots)
    stop.wait()
    log.info("draining")
    slots.drain()
    drained.set()
    thread.join()
    reporter.stop()


def _stop(stop: threading.Event, frame: FrameType | None) -> None:
    if stop.is_set():
        raise SystemExit(1)  # asked twice: leases will lapse, and others finish the work
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
