"""The local stack, as a person at a terminal meets it: signals, exit codes, leftovers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoint import build

ROOT = Path(__file__).parents[1]
PATIENCE_S = 120


class Stack:
    """`make run` in a process group of its own, with state in a folder of its own."""

    def __init__(self, state: Path, **variables: object):
        self.state = state
        self.log = state.with_suffix(".log")
        environ = {k: v for k, v in os.environ.items() if k != "REDIS_URL" and "MAKE" not in k}
        with self.log.open("w") as log:
            self.make = subprocess.Popen(
                # The environment that runs this test serves for the stack too.
                ["make", "run", f"BIN={Path(sys.executable).parent}", "INSTALLED="]
                + [f"{name}={value}" for name, value in {"STATE": state, **variables}.items()],
                cwd=ROOT,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def read_ready(self) -> str:
        """What stands in the frame; its last line is told last."""
        assert self.make.stdout is not None
        lines: list[str] = []
        while (line := self.make.stdout.readline()) and not (lines and line.startswith("====")):
            lines += [line] if line.strip("=\n") or lines else []
        return "".join(lines)

    def end(self) -> tuple[int, str, list[str]]:
        """Exit code, stdout and the lines of stderr."""
        out, _ = self.make.communicate(timeout=PATIENCE_S)
        return self.make.returncode, out, self.log.read_text().splitlines()

    def processes(self) -> dict[int, str]:
        """What lives and was started by this stack: it has our STATE, or Redis' data folder."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ = (folder / "environ").read_bytes()
                at_home = (folder / "cwd").resolve().is_relative_to(self.state)
                if f"STATE={self.state}".encode() in environ or at_home:
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                    found[int(folder.name)] = command.decode()
            except OSError:
                pass  # it has just ended
        return found

    def pid(self, word: str) -> int:
        [pid] = [p for p, command in self.processes().items() if word in command]
        return pid


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


@pytest.fixture
def start(tmp_path: Path, port: int, checkpoint: Path) -> Iterator[object]:
    stacks = []

    def start(**variables: object) -> Stack:
        stacks.append(Stack(tmp_path / "state", PORT=port, **({"MODEL": checkpoint} | variables)))
        return stacks[-1]

    yield start
    for stack in stacks:
        for pid in stack.processes():
            os.kill(pid, signal.SIGKILL)
        stack.make.communicate()


def ask(url: str, body: dict[str, object] | None = None) -> dict[str, object]:
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        answer: dict[str, object] = json.load(response)
        return answer


def test_once_prints_where_the_picture_is_and_the_report_and_stops(start, port):
    stack = start(ONCE='a $5 cat, "on" the moon')
    code, out, err = stack.end()
    path, _, report = out.partition("\n")
    picture = Path(path).read_bytes()
    Path(path).unlink()
    assert picture.startswith(b"\x89PNG")
    assert json.loads(report)["safety"]["effective"]["applied"] is True
    assert code == 0, err
    assert stack.processes() == {}


@pytest.mark.parametrize("whom", ["the process group", "make alone"])
def test_a_signal_stops_everything_once_running_work_has_ended(start, port, whom):
    stack = start()
    said = stack.read_ready()
    assert f"ready at http://127.0.0.1:{port}\n" in said and "Ctrl-C" in said
    assert max(map(len, said.splitlines())) <= 80
    [curl] = re.findall(r"^curl .*\n.*$", said, re.MULTILINE)
    answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True)
    assert json.loads(answer.stdout)["status"] == "succeeded", answer.stderr
    job = ask(f"http://127.0.0.1:{port}/generate", {"prompt": "a cat", "steps": 200, "seed": 1})
    while ask(f"http://127.0.0.1:{port}/generations/{job['id']}")["status"] == "queued":
        time.sleep(0.05)
    if whom == "make alone":
        stack.make.send_signal(signal.SIGTERM)
    else:
        os.killpg(stack.make.pid, signal.SIGINT)
    code, out, err = stack.end()
    assert out == ""
    assert code in (0, -signal.SIGINT, -signal.SIGTERM, 2), err  # make tells of the signal
    assert stack.processes() == {}
    assert list((stack.state / "store" / str(job["id"])).glob("*.png"))


def test_a_crash_of_one_process_ends_the_stack_with_an_error(start):
    stack = start()
    stack.read_ready()
    assert stack.pid("redis-server")
    os.kill(stack.pid("-m worker "), signal.SIGKILL)  # the supervisor, which nobody watches
    code, _, err = stack.end()
    assert code != 0
    assert "safelatent: worker ended with SIGKILL" in err[-2]
    assert stack.processes() == {}


def test_a_crash_of_the_gpu_process_is_survived(start, port):
    stack = start()
    stack.read_ready()
    url = f"http://127.0.0.1:{port}"
    job = ask(f"{url}/generate", {"prompt": "a cat", "steps": 300, "seed": 1})
    while ask(f"{url}/generations/{job['id']}")["status"] == "queued":
        time.sleep(0.05)
    os.kill(stack.pid("-m worker.child"), signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while (end := ask(f"{url}/generations/{job['id']}")["status"]) in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert end == "succeeded"
    assert "queued again" in stack.log.read_text()


def test_a_missing_model_ends_the_stack_with_the_workers_sentence(start, tmp_path):
    code, out, err = start(MODEL=tmp_path / "nowhere").end()
    assert (code, out) == (2, "")
    assert err[-2].startswith("safelatent worker: ") and "nowhere" in err[-2]
    assert err[-1].startswith("make: ")


def test_a_taken_port_is_said_in_one_sentence(start, port):
    with socket.create_server(("127.0.0.1", port)):
        code, out, err = start().end()
    assert (code, out) == (2, "")
    assert f"port {port}" in err[0] and err[1].startswith("make: ")
    assert len(err) == 2
