"""`safelatent doctor`: what must be right, looked at, each with its cure where it is not.

What the service tells is looked at from anywhere; Redis, the store, the checkpoint and the device
only where the environment names them and what can reach them is installed.
"""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import httpx
from rich.text import Text

from safelatent import Client, errors
from safelatent.cli.speaking import out

SKEW_S = 5
"""A clock that is further off makes ages, deadlines and signatures wrong."""
DEVICE = (
    "import torch; gpu = torch.cuda.is_available(); "
    "print(torch.__version__, torch.cuda.get_device_name() if gpu else 'cpu', sep=', ')"
)


class Finding(NamedTuple):
    verdict: Literal["good", "bad", "unknown"]
    what: str
    said: str
    cure: str = ""


def show(finding: Finding) -> None:
    mark, style = {"good": ("ok", "green"), "bad": ("no", "red"), "unknown": ("--", "yellow")}[
        finding.verdict
    ]
    out.print(Text.assemble((mark, style), f"  {finding.what:9} {finding.said}"))
    if finding.cure:
        out.print(Text(f"    {'':9} {finding.cure}", style="bright_black"))


def examine(base_url: str, api_key: str | None) -> list[Finding]:
    return [*_environment(), *_service(base_url, api_key), *_server_side()]


def _environment() -> Iterator[Finding]:
    installed = []
    for name in ("safelatent", "httpx", "pydantic"):
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            installed.append(f"{name} from this folder")
    yield Finding("good", "python", f"{platform.python_version()}, {', '.join(installed)}")


def _service(base_url: str, api_key: str | None) -> Iterator[Finding]:
    base = base_url.rstrip("/")
    try:
        began = time.time()
        alive = httpx.get(f"{base}/healthz", timeout=5)
        took = time.time() - began
    except (httpx.TransportError, httpx.InvalidURL) as error:
        cure = "start it with `make run`, or name another: --url or SAFELATENT_URL"
        yield Finding("bad", "service", f"{base_url} does not answer: {error}", cure)
        return
    if alive.status_code != 200 or "X-Request-ID" not in alive.headers:
        cure = "SAFELATENT_URL should be where the service is, with no path behind it"
        said = f"{base_url} answers {alive.status_code}, and is no safelatent service"
        yield Finding("bad", "service", said, cure)
        return
    yield Finding("good", "service", f"{base_url} answers in {1000 * took:.0f} ms")
    yield from _clock(alive, began + took / 2)
    yield _ready(base)
    with Client(base_url, api_key=api_key, timeout=10, max_retries=0) as client:
        try:
            may = client.capabilities()
            yield Finding(
                "good", "key", f"levels {', '.join(may.levels)}; {may.limits['n']} images"
            )
            for model in client.models():
                said = f"{model.id}, warm in {model.workers}"
                cure = "" if model.workers else f"start one: SAFELATENT_MODEL={model.id} make run"
                yield Finding("good" if model.workers else "unknown", "model", said, cure)
        except (errors.Unauthorized, errors.Forbidden) as error:
            cure = "put your key into SAFELATENT_API_KEY; `safelatent key new` makes one"
            yield Finding("bad", "key", str(error), cure)
        except errors.SafelatentError as error:
            yield Finding("bad", "redis", str(error), "look at the service's log and its REDIS_URL")


def _clock(response: httpx.Response, now: float) -> Iterator[Finding]:
    try:
        theirs = parsedate_to_datetime(response.headers["Date"])
    except (KeyError, ValueError):
        yield Finding("unknown", "clock", "the service does not say what time it has")
        return
    skew = (theirs - datetime.fromtimestamp(now, UTC)).total_seconds()
    if abs(skew) <= SKEW_S:
        yield Finding("good", "clock", "the service's and this one agree to a few seconds")
    else:
        said = f"the service's is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
        yield Finding("bad", "clock", said, "let NTP set both: timedatectl set-ntp true")


def _ready(base: str) -> Finding:
    try:
        ready = httpx.get(f"{base}/readyz", timeout=10)
        body = ready.json()
    except (httpx.TransportError, ValueError) as error:
        return Finding("bad", "workers", f"/readyz: {error}", "look at the service's log")
    if ready.status_code == 200:
        return Finding("good", "workers", f"{body['workers']} with {body['model']} warm")
    cure = "start a worker (`make run`, or `python -m worker`); a large model loads for minutes"
    if "Redis" in body.get("detail", ""):
        cure = "start Redis, and look at the service's REDIS_URL"
    return Finding("bad", "workers", body.get("detail", ready.text[:200]), cure)


def _server_side() -> Iterator[Finding]:
    if url := os.environ.get("REDIS_URL"):
        yield _redis(url)
    if url := os.environ.get("SAFELATENT_STORE_URL"):
        yield _store(url)
    if source := os.environ.get("SAFELATENT_MODEL"):
        yield _checkpoint(source)
    is_worker = {"SAFELATENT_MODEL", "SAFELATENT_DEVICE"} & os.environ.keys()
    if is_worker and find_spec("torch"):
        yield _device()


def _redis(url: str) -> Finding:
    if not find_spec("redis"):
        return Finding("unknown", "redis", "REDIS_URL is set, and the package redis is not here")
    import redis

    from safelatent.connecting import connect

    try:
        with connect(url, socket_timeout=5, socket_connect_timeout=5) as connection:
            told = connection.info()
            policy = connection.config_get("maxmemory-policy").get("maxmemory-policy", "")
    except (redis.RedisError, ValueError) as error:
        return Finding("bad", "redis", str(error), "REDIS_URL should name one that runs")
    said = f"{told['redis_version']}, {told['used_memory_human']} used"
    if policy not in ("noeviction", ""):
        cure = "set maxmemory-policy noeviction: it may throw queued generations away"
        return Finding("bad", "redis", f"{said}, maxmemory-policy {policy}", cure)
    return Finding("good", "redis", said)


def _store(url: str) -> Finding:
    if not find_spec("obstore"):
        return Finding("unknown", "store", "SAFELATENT_STORE_URL is set, and obstore is not here")
    from safelatent.store import Store

    key = f"doctor-{os.getpid()}/probe"
    try:
        store = Store(url)
        store.put(key, b"probe")
        same = store.get(key) == b"probe"
        store.delete(key.split("/")[0])
    except (errors.SafelatentError, ValueError, OSError) as error:
        cure = "SAFELATENT_STORE_URL should name what can be written, with its credentials set"
        return Finding("bad", "store", str(error), cure)
    return Finding("good" if same else "bad", "store", f"{url} can be written and read")


def _checkpoint(source: str) -> Finding:
    if not source.startswith(("models/", ".", "~", "/")):
        return Finding("unknown", "model", f"{source} comes from the hub when a worker starts")
    index = Path(source).expanduser() / "model_index.json"
    if index.is_file():
        return Finding("good", "model", f"{source} is a checkpoint")
    cure = "SAFELATENT_MODEL should be a folder in diffusers' layout, or an id of the hub"
    return Finding("bad", "model", f"there is no {index}", cure)


def _device() -> Finding:
    """torch takes seconds to import, and may break a process: it gets one of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", DEVICE], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return Finding("unknown", "device", "torch was not there within 120 s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Finding("bad", "device", f"torch cannot be used: {last}", "install it again")
    wanted = os.environ.get("SAFELATENT_DEVICE", "")
    if wanted.startswith("cuda") and done.stdout.strip().endswith("cpu"):
        cure = "look at the driver (nvidia-smi), or unset SAFELATENT_DEVICE"
        return Finding(
            "bad", "device", f"{wanted} was asked for: torch {done.stdout.strip()}", cure
        )
    return Finding("good", "device", f"torch {done.stdout.strip()}")
