"""`python -m service.webhooks`: deliver until SIGTERM, then end what was begun."""

import asyncio
import signal
import sys

from pydantic import ValidationError

from safelatent import logs
from safelatent.connecting import connect
from safelatent.jobs import Jobs
from service.__main__ import sentence
from service.auth import Callers
from service.policy import UnusablePolicy
from service.webhooks.deliverer import Deliverer
from service.webhooks.settings import Settings


def main() -> None:
    try:
        settings = Settings()  # type: ignore[call-arg]
        logs.configure(settings.log_level, settings.log_format)
        callers = Callers(settings.policy_file, settings.open_tenant)
    except ValidationError as error:
        sys.exit(f"safelatent webhooks: {sentence(error)}")
    except UnusablePolicy as error:
        sys.exit(f"safelatent webhooks: {error}")
    connection = connect(settings.redis_url, socket_connect_timeout=2)
    deliverer = Deliverer(settings, Jobs(connection), callers.webhook_secrets)
    asyncio.run(deliver(deliverer))


async def deliver(deliverer: Deliverer) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await deliverer.run(stop)


if __name__ == "__main__":
    main()
