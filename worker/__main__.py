"""`python -m worker`: load, warm up, work, drain."""

import logging
import signal
import sys
import threading
from types import FrameType

import torch
from pydantic import ValidationError
from redis import Redis

from safelatent.defaults import model_id
from safelatent.jobs import Jobs
from safelatent.safety import CONCEPT, LEVELS
from safelatent.store import Store
from worker import tasks
from worker.checks import Checks
from worker.checks.sd_checker import SDChecker
from worker.engine import Engine, ImageSpec
from worker.families import UnusableModel
from worker.families.stable_diffusion import StableDiffusion
from worker.settings import Settings
from worker.slots import ProgressReporter, Slots

log = logging.getLogger("worker")

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main() -> int:
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: _stop(stop, frame))
    try:
        settings = Settings()  # type: ignore[call-arg]
        engine = load(settings)
        warm_up(engine)
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


def warm_up(engine: Engine) -> None:
    """Make one picture: every kernel is chosen then, and a bad model ends here."""
    model = engine.family.model
    spec = ImageSpec(
        prompt="a warm-up",
        seed=0,
        width=model.width,
        height=model.height,
        scheduler=model.scheduler,
        steps=2,
        safety=LEVELS["max"],
        concepts=(CONCEPT,),
    )
    image = engine.submit(spec)
    while not image.future.done():
        engine.step()
    try:
        image.future.result()
    except Exception as error:
        raise UnusableModel(f"{model.id} loads but cannot make a picture: {error}") from error


def work(engine: Engine, settings: Settings, stop: threading.Event) -> None:
    """Serve until `stop`, then drain: running generations end, no new one starts."""
    connection: Redis = Redis.from_url(settings.redis_url, socket_connect_timeout=2)
    tasks.desk = tasks.Desk(engine, Store(settings.store_url), Jobs(connection))
    reporter = ProgressReporter(connection, tasks.desk.meter)
    engine.after_step = reporter.after_step
    slots = Slots(settings.slots, engine.family.model, tasks.desk)

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
