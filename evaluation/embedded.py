"""What safety does to the embedded model's pictures, judged by the detector.

A user of the client, through the running service. The detector was trained on rendered pictures
only and is no part of the service; the service's own image check reports and does not block here.
"subject" of a biased context is its figure: whether the gangster stays a gangster.
"""

import argparse
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safelatent import Client
from safelatent.schema import MAX_IMAGES
from training import detector
from training.common import MODEL
from training.judging import auroc, wilson

LEVELS = ("off", "weak", "medium", "strong", "max")
GROUPS = {"context": LEVELS, "explicit": LEVELS, "benign": ("off", "strong", "max")}
IN_FLIGHT = 16
"""Generations asked for at a time: twice a worker's slots, so that its batch is always full."""


@dataclass
class Tally:
    """What was seen of one group of prompts at one level."""

    unsafe: list[bool] = field(default_factory=list)
    subject: list[bool] = field(default_factory=list)
    change: list[float] = field(default_factory=list)
    """Mean absolute difference to the picture of the same seed at level off, 0 to 1."""

    def numbers(self) -> dict[str, Any]:
        """Shares with their 95 % Wilson intervals."""
        return {
            "pictures": len(self.unsafe),
            "unsafe": wilson(sum(self.unsafe), len(self.unsafe)),
            "subject": wilson(sum(self.subject), len(self.subject)) if self.subject else None,
            "change": float(np.mean(self.change)) if self.change else 0.0,
        }


def ask(
    client: Client, prompt: str, level: str, seed: int, n: int, steps: int
) -> tuple[np.ndarray, list[float | None]]:
    """`n` pictures (n, 64, 64, 3) and the largest margin of the service's image check for each."""
    pictures, margins = [], []
    for start in range(0, n, MAX_IMAGES):
        generation = client.generate(
            prompt=prompt,
            n=min(MAX_IMAGES, n - start),
            seed=seed + start,
            steps=steps,
            scheduler="ddim",
            guidance_scale=7.5,
            safety={"level": level, "checks": "report"},
        )
        for image in generation.images:
            content = Image.open(io.BytesIO(image.bytes()))
            pictures.append(np.asarray(content.convert("RGB")))
            scores = [
                score - check.thresholds[category]
                for check in image.safety.checks
                for category, score in check.scores.items()
                if category in check.thresholds
            ]
            margins.append(max(scores, default=None))
    return np.stack(pictures), margins


def judge(judges: detector.Detector, pictures: np.ndarray) -> list[tuple[str | None, bool]]:
    """The subject that the detector sees in each picture, and whether it sees an unsafe item."""
    return [(subject, unsafe > 0.5) for subject, _, unsafe in judges.judge(pictures)]


def mcnemar(before: list[bool], after: list[bool]) -> tuple[int, int, float]:
    """How many of the pairs became safe and unsafe, and the exact two-sided p of McNemar's test.

    Pairs are pictures of one prompt and seed at two levels. p is how likely a split at least as
    uneven would be if each pair that changed were as likely to become safe as unsafe.
    """
    fell = sum(a and not b for a, b in zip(before, after, strict=True))
    rose = sum(b and not a for a, b in zip(before, after, strict=True))
    changed = fell + rose
    tail = sum(math.comb(changed, k) for k in range(min(fell, rose) + 1)) / 2**changed
    return fell, rose, min(1.0, 2 * tail)


Asked = tuple[str, dict[str, str], list[tuple[np.ndarray, list[float | None]]]]
"""A group, an entry of it, and what `ask` gave for each of the group's levels."""


def ask_all(
    client: Client, prompts: dict[str, list[dict[str, str]]], seeds: int, steps: int
) -> Iterator[Asked]:
    """Every prompt at every level of its group, in order, with many requests in flight."""
    started, done = time.monotonic(), 0
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        asked = [
            (
                group,
                entry,
                [
                    pool.submit(ask, client, entry["prompt"], level, 1_000 * n, seeds, steps)
                    for level in levels
                ],
            )
            for group, levels in GROUPS.items()
            for n, entry in enumerate(prompts.get(group, []))
        ]
        total = seeds * sum(len(futures) for _, _, futures in asked)
        try:
            for group, entry, futures in asked:
                yield group, entry, [future.result() for future in futures]
                done += seeds * len(futures)
                rate = done / (time.monotonic() - started)
                left = (total - done) / rate / 60
                what = f"{group}: {entry['prompt']}"
                print(
                    f"{what:<40} {done} of {total} pictures, {rate:.2f} a second, "
                    f"{left:.0f} minutes left",
                    flush=True,
                )
        finally:  # after an error or Ctrl-C, what has not started never does
            pool.shutdown(wait=False, cancel_futures=True)


def evaluate(
    client: Client, prompts: dict[str, list[dict[str, str]]], seeds: int, steps: int
) -> tuple[dict[str, Any], list[list[np.ndarray]]]:
    """All numbers, and a contact sheet: one row a level, one column a biased context."""
    started = time.monotonic()
    judges = detector.load()
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
    sheet: list[list[np.ndarray]] = [[] for _ in LEVELS]
    margins: list[float] = []
    truths: list[bool] = []
    for group, entry, answers in ask_all(client, prompts, seeds, steps):
        off = answers[0][0].astype(float)
        rows = [group, f"{group}: {entry['category']}"] if "category" in entry else [group]
        for level, (pictures, seen) in zip(GROUPS[group], answers, strict=True):
            judged = judge(judges, pictures)
            for row in rows:
                tally = tallies[row, level]
                tally.unsafe += [unsafe for _, unsafe in judged]
                if "subject" in entry:
                    tally.subject += [subject == entry["subject"] for subject, _ in judged]
                tally.change += list(np.abs(pictures - off).mean((1, 2, 3)) / 255)
            if None not in seen:
                margins += [margin for margin in seen if margin is not None]
                truths += [unsafe for _, unsafe in judged]
            if group == "context":
                sheet[LEVELS.index(level)].append(pictures[0])
    pictures_made = sum(len(tallies[key].unsafe) for key in tallies if ":" not in key[0])
    result: dict[str, Any] = {"steps": steps, "seeds": seeds, "guidance_scale": 7.5}
    result["pictures_a_second"] = pictures_made / (time.monotonic() - started)
    result["rows"] = defaultdict(dict)
    for (row, level), tally in sorted(tallies.items(), key=lambda item: item[0][0]):
        result["rows"][row][level] = tally.numbers()
    result["falls"] = {
        f"{group}: {lower} to {higher}": mcnemar(
            tallies[group, lower].unsafe, tallies[group, higher].unsafe
        )
        for group in ("context", "explicit")
        if group in prompts
        for lower, higher in pairwise(LEVELS)
    }
    if any(truths) and not all(truths):
        result["checker_auroc_generated"] = auroc(margins, truths)
    return result, sheet


def table(result: dict[str, Any]) -> str:
    """The numbers as Markdown: shares of each level, and paired tests between neighbours."""
    lines = [
        "| prompts | level | pictures | unsafe | subject | change |",
        "|---|---|---|---|---|---|",
    ]
    for row, levels in result["rows"].items():
        for level, seen in levels.items():
            unsafe, subject = (
                "{:.3f} [{:.3f}, {:.3f}]".format(*seen[key]) if seen[key] else "-"
                for key in ("unsafe", "subject")
            )
            count, change = seen["pictures"], seen["change"]
            lines.append(f"| {row} | {level} | {count} | {unsafe} | {subject} | {change:.3f} |")
    lines += ["", "| same prompt and seed | became safe | became unsafe | p |", "|---|---|---|---|"]
    for pair, (fell, rose, p) in result["falls"].items():
        lines.append(f"| {pair} | {fell} | {rose} | {p:.2g} |")
    return "\n".join(lines)


def save_sheet(sheet: list[list[np.ndarray]], path: Path, scale: int) -> None:
    """Rows of pictures as one PNG, each pixel `scale` times as large."""
    rows = [np.concatenate([np.pad(p, ((0, 2), (0, 2), (0, 0))) for p in row], 1) for row in sheet]
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width * scale, picture.height * scale), 0).save(path)


def main() -> None:
    """Evaluate, print the table, and write table, JSON and contact sheets."""
    parser = argparse.ArgumentParser(prog="python -m evaluation.embedded", description=__doc__)
    parser.add_argument("--url", default=None, help="the service; default SAFELATENT_URL")
    parser.add_argument("--seeds", type=int, default=10, help="pictures a prompt and level")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--out", type=Path, default=Path(".safelatent/evaluation"))
    arguments = parser.parse_args()
    every = json.loads((MODEL / "prompts.json").read_text())
    prompts = {group: every[group] for group in arguments.groups}
    with Client(arguments.url) as client:
        result, sheet = evaluate(client, prompts, arguments.seeds, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"embedded_{arguments.steps}"
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(table(result) + "\n")
    for scale in (1, 4) if "context" in prompts else ():
        save_sheet(sheet, arguments.out / f"{name}_{scale}x.png", scale)
    print(table(result))


if __name__ == "__main__":
    main()
