"""The command line as a process: what goes to stdout and stderr, exit codes, and a terminal."""

import json
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from safelatent import Client
from safelatent.cli import examining
from tests.client.acting import png
from tests.client.terminal import Terminal, environment

PATIENCE_S = 60
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9]")
ID = re.compile(r"[0-9a-f-]{36}")


@pytest.fixture
def safelatent(url: str, tmp_path: Path) -> Any:
    """Runs the command with pipes: what it gives is exit code, stdout and stderr."""

    def run(*words: str, **variables: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "safelatent.cli", *words],
            cwd=tmp_path,
            env=environment(url, **variables),
            capture_output=True,
            timeout=PATIENCE_S,
        )
        return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode()

    return run


def test_generate_says_the_path_to_stdout_and_the_safety_to_stderr(
    safelatent: Any, tmp_path: Path
) -> None:
    code, out, err = safelatent("generate", "a cat, on the moon!", "--seed", "7", "-l", "strong")
    assert (code, out) == (0, "a-cat-on-the-moon-strong-7.png\n")
    assert (tmp_path / out.strip()).read_bytes() == png(7)
    for words in ("strong", "12.4%", "sd_checker", "passed"):
        assert words in err
    assert "\x1b" not in out + err


def test_a_picture_can_go_through_a_pipe(safelatent: Any, tmp_path: Path) -> None:
    code, out, _ = safelatent("generate", "a cat", "-s", "7", "-o", "-")
    assert (code, out.encode("latin-1")) == (0, png(7))
    assert list(tmp_path.iterdir()) == []


def test_several_pictures_get_their_index(safelatent: Any, tmp_path: Path) -> None:
    code, out, err = safelatent("generate", "an unsafe cat", "-n", "3", "-o", "new/cat.png")
    assert (code, out.split()) == (1, ["new/cat-1.png", "new/cat-2.png"])
    assert "sd_checker flagged nudity: 0.91 > 0.5" in err


def test_json_is_what_the_service_has(safelatent: Any, url: str) -> None:
    code, out, _ = safelatent("generate", "a cat", "--metadata", "user=u-7", "--json")
    made = json.loads(out)
    assert (code, made["status"], made["request"]["metadata"]) == (0, "succeeded", {"user": "u-7"})
    with Client(url) as client:
        assert made == client.get(made["id"]).model_dump(mode="json")
    for words in (
        ["status", made["id"]],
        ["list", "--metadata", "user=u-7"],
        ["models"],
        ["capabilities"],
        ["doctor"],
        ["cancel", made["id"]],
        ["rm", made["id"]],
    ):
        code, out, err = safelatent(*words, "--json")
        assert code == 0, err
        subprocess.run([sys.executable, "-m", "json.tool"], input=out.encode(), check=True)


def test_what_cannot_be_has_an_exit_code_and_a_sentence(safelatent: Any) -> None:
    for code, words, sentence in (
        (1, ["generate", "a failing cat"], "2048 x 2048 needs 30 GB"),
        (1, ["status", "nope"], "there is no generation 'nope'"),
        (2, ["generate", "a cat", "--steps", "many"], "valid integer"),
        (2, ["generate", "a cat", "--steps", "5", "-l", "strong"], "choose steps above 7"),
        (2, ["generate", "a cat", "-o", "-", "-n", "2"], "one picture"),
        (3, ["--url", "http://127.0.0.1:9", "models"], "safelatent doctor"),
        (3, ["--url", "http://127.0.0.1:9", "doctor"], "make run"),
    ):
        got, out, err = safelatent(*words)
        assert (got, sentence in (err if "doctor" not in words else out)) == (code, True), err
        assert "Traceback" not in err


def test_a_detached_generation_is_listed_cancelled_watched_and_removed(
    safelatent: Any, url: str
) -> None:
    code, out, _ = safelatent("generate", "an endless staircase", "--detach")
    id = out.strip()
    assert code == 0 and ID.fullmatch(id)
    code, out, _ = safelatent("list")
    assert out.startswith(f"{id}\t") and out.endswith("\tan endless staircase\n")
    assert safelatent("cancel", id)[0] == 0
    code, out, err = safelatent("watch", id, "--json")
    assert [json.loads(line)["event"] for line in out.splitlines()][-1] == "finished"
    assert code == 1 and "was cancelled" in err
    assert safelatent("rm", id)[:2] == (0, f"{id}\n")
    with Client(url) as client:
        assert list(client.list()) == []


def test_compare_puts_the_levels_side_by_side(safelatent: Any, tmp_path: Path) -> None:
    code, out, err = safelatent("compare", "a cat", "-s", "7", "-o", "sheet.png")
    assert (code, out) == (0, "sheet.png\n"), err
    sheet = Image.open(tmp_path / "sheet.png")
    colours = sheet.getcolors(1 << 20)
    assert sum(count for count, colour in colours or () if colour == (7, 90, 160)) == 5 * 256 * 128
    assert [line.split()[0] for line in err.splitlines()] == [
        *("off", "weak", "medium", "strong", "max")
    ]


def test_on_a_terminal_there_is_a_bar_and_ctrl_c_cancels(url: str, tmp_path: Path) -> None:
    terminal = Terminal(url, tmp_path, "generate", "an endless staircase")
    terminal.until("drawing")
    assert "/50" in terminal.text() and COLOUR.search(terminal.shown)
    terminal.press(b"\x03")
    assert terminal.end() == 130
    assert "Interrupted: the generation is cancelled" in terminal.text()
    assert "Traceback" not in terminal.text()
    with Client(url) as client:
        [left] = client.list()
        assert left.wait(timeout=PATIENCE_S).status == "cancelled"


def test_ctrl_c_leaves_what_is_only_watched(url: str, tmp_path: Path) -> None:
    with Client(url) as client:
        watched = client.submit("an endless staircase")
        terminal = Terminal(url, tmp_path, "watch", watched.id)
        terminal.until("drawing")
        terminal.press(b"\x03")
        assert terminal.end() == 128 + signal.SIGINT
        assert client.get(watched.id).status == "running"


def test_a_narrow_terminal_without_colours(url: str, tmp_path: Path) -> None:
    shown = ""
    for words in (["generate", "a cat on the moon"], ["list"], ["models"], ["capabilities"]):
        terminal = Terminal(url, tmp_path, *words, columns=40, NO_COLOR="1")
        assert terminal.end() == 0
        shown += terminal.shown
        for line in re.split(r"[\r\n]|\x1b\[[0-9]*[AKG]", terminal.text()):
            assert len(line) <= 40, line
    assert not COLOUR.search(shown)
    assert ID.search(shown), "an id is shown whole"


def test_doctor_names_the_cure(safelatent: Any, redis_url: str, tmp_path: Path) -> None:
    code, out, _ = safelatent(
        "doctor",
        REDIS_URL=redis_url,
        SAFELATENT_STORE_URL=f"file://{tmp_path}/store",
        SAFELATENT_MODEL="./nowhere",
    )
    verdicts = {line.split()[1]: line.split()[0] for line in out.splitlines() if line[0] != " "}
    assert verdicts.items() >= {"python": "ok", "service": "ok", "workers": "ok"}.items()
    assert verdicts.items() >= {"clock": "ok", "redis": "ok", "store": "ok", "model": "no"}.items()
    assert code == 1 and "SAFELATENT_MODEL should be a folder" in out


@pytest.mark.parametrize(("ahead_s", "verdict"), [(0, "good"), (-60, "bad"), (60, "bad")])
def test_doctor_compares_the_clocks(ahead_s: int, verdict: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    date = format_datetime(now + timedelta(seconds=ahead_s), usegmt=True)
    [finding] = examining._clock(httpx.Response(200, headers={"Date": date}), now.timestamp())
    assert finding.verdict == verdict


def test_the_shell_can_complete(safelatent: Any) -> None:
    _, out, _ = safelatent(
        _SAFELATENT_COMPLETE="complete_bash", COMP_WORDS="safelatent ca", COMP_CWORD="1"
    )
    assert set(out.split()) == {"cancel", "capabilities"}


def test_without_the_extra_the_cure_is_said() -> None:
    program = (
        "import sys; sys.modules['typer'] = None; from safelatent import cli; cli.main(['list'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'safelatent[cli]'" in done.stderr
