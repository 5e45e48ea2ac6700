"""What is written about the metrics is true: the documentation's table, the dashboard, the alerts.

`python -m tests.test_observability` writes the table.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from redis import Redis

import service.metrics
import worker.metrics
from safelatent.jobs import Jobs

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy" / "observability"
DOCUMENT = ROOT / "docs" / "observability.md"
BEGIN, END = "writes this table -->\n", "<!-- end -->"
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_count", "_sum"),
}


def registries() -> dict[str, CollectorRegistry]:
    nowhere = Jobs(Redis.from_url("unix:///nowhere"))
    return {
        "frontend": service.metrics.Metrics(nowhere).registry,
        "worker": worker.metrics.Metrics().registry,
    }


def metrics() -> Iterator[tuple[str, str, str, str, list[str]]]:
    """(Where, name, kind, help, labels) of every metric."""
    for where, registry in registries().items():
        for collector in registry._collector_to_names:
            for family in collector.describe():
                labels = getattr(collector, "_labelnames", getattr(family, "_labelnames", ()))
                yield where, family.name, family.type, family.documentation, list(labels)


def table() -> str:
    lines = ["| metric | of | kind | labels | meaning |", "|---|---|---|---|---|"]
    for where, name, kind, said, labels in metrics():
        name += "_total" if kind == "counter" else ""
        named = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {where} | {kind} | {named} | {said} |")
    return "\n".join(lines) + "\n"


def samples() -> set[str]:
    """Every name that a query can use."""
    return {name + suffix for _, name, kind, _, _ in metrics() for suffix in SUFFIXES[kind]}


def test_the_table_is_what_the_registries_hold() -> None:
    written = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    assert written == table(), "python -m tests.test_observability writes it anew"


def test_every_name_has_its_unit_and_every_metric_says_what_it_is() -> None:
    units = ("_seconds", "_ratio", "_pixels", "_images", "_rows", "_jobs", "_requests")
    counts = ("_running", "_waiting", "_slots", "_busy", "_workers", "_up", "_in_flight", "_info")
    for _, name, kind, said, _ in metrics():
        assert said.endswith("."), name
        assert kind == "counter" or name.endswith(units + counts), name


@pytest.mark.parametrize("path", ["grafana/safelatent.json", "alerts.yml"])
def test_queries_ask_for_metrics_that_exist(path: str) -> None:
    asked = set(re.findall(r"\bsafelatent_\w+", (DEPLOY / path).read_text()))
    assert len(asked) >= 3
    assert asked <= samples()


def test_the_dashboard_has_its_four_rows_and_no_empty_panel() -> None:
    panels = json.loads((DEPLOY / "grafana" / "safelatent.json").read_text())["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Queue", "Latency", "Batch", "Safety"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["type"] == "row" or all(target["expr"] for target in panel["targets"])


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", DEPLOY / "prometheus.yml"],
        ["test", "rules", ROOT / "tests" / "alerts_test.yml"],
    ],
)
def test_promtool_finds_nothing_wrong(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
