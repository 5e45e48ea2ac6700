"""What safety does to the embedded model's pictures, judged by the detector.

A user of the client, through the running service. The detector was trained on rendered pictures
only and is no part of the service; the service's own image check reports and does not block here.
"""

import argparse
import io
import json
from collections import defaultdict
from dataclasses import dataclass, field
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


def evaluate(
    client: Client, prompts: dict[str, list[dict[str, str]]], seeds: int, steps: int
) -> tuple[dict[str, Any], list[list[np.ndarray]]]:
    """All numbers, and a contact sheet: one row a level, one column a biased context."""
    judges = detector.load()
    tallies: dict[tuple[str, str], Tally] = defaultdict(Tally)
    sheet: list[list[np.ndarray]] = [[] for _ in LEVELS]
    margins: list[float] = []
    truths: list[bool] = []
    for group, levels in GROUPS.items():
        for number, entry in enumerate(prompts[group]):
            seed, off = 1_000 * number, None
            rows = [group, f"{group}: {entry['category']}"] if "category" in entry else [group]
            for level in levels:
                pictures, seen = ask(client, entry["prompt"], level, seed, seeds, steps)
                off = pictures if off is None else off
                judged = judge(judges, pictures)
                for row in rows:
                    tally = tallies[row, level]
                    tally.unsafe += [unsafe for _, unsafe in judged]
                    if "subject" in entry:
                        tally.subject += [subject == entry["subject"] for subject, _ in judged]
                    tally.change += list(np.abs(pictures - off.astype(float)).mean((1, 2, 3)) / 255)
                if None not in seen:
                    margins += [margin for margin in seen if margin is not None]
                    truths += [unsafe for _, unsafe in judged]
                if group == "context":
                    sheet[levels.index(level)].append(pictures[0])
            print(f"{group}: {entry['prompt']}", flush=True)
    result: dict[str, Any] = {"steps": steps, "seeds": seeds, "guidance_scale": 7.5}
    result["rows"] = defaultdict(dict)
    for (row, level), tally in sorted(tallies.items(), key=lambda item: item[0][0]):
        result["rows"][row][level] = tally.numbers()
    if any(truths) and not all(truths):
        result["checker_auroc_generated"] = auroc(margins, truths)
    return result, sheet


def table(result: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
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
    parser.add_argument("--out", type=Path, default=Path(".safelatent/evaluation"))
    arguments = parser.parse_args()
    prompts = json.loads((MODEL / "prompts.json").read_text())
    with Client(arguments.url) as client:
        result, sheet = evaluate(client, prompts, arguments.seeds, arguments.steps)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"embedded_{arguments.steps}"
    (arguments.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(table(result) + "\n")
    for scale in (1, 4):
        save_sheet(sheet, arguments.out / f"{name}_{scale}x.png", scale)
    print(table(result))


if __name__ == "__main__":
    main()
