"""`python -m benchmarks [name ...]`: print tables, and write them to .safelatent/bench."""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))

# torch reads the threads as it loads
from benchmarks import engine, enqueue, fairness, observing, service

BENCHMARKS = {
    "engine": engine.run,
    "service": service.run,
    "fairness": fairness.run,
    "enqueue": enqueue.run,
    "observing": observing.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), metavar="|".join(BENCHMARKS))
    parser.add_argument("--model", default="models/emoji_scenes", help="folder of a checkpoint")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side")
    options = parser.parse_args()
    if unknown := set(options.names) - BENCHMARKS.keys():
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}")
    folder = Path(".safelatent/bench")
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.names:
        rows = BENCHMARKS[name](options.model, options.repeats)
        print(f"\n{name}: {options.model}, {os.environ['OMP_NUM_THREADS']} threads")
        for row in rows:
            print(f"  {row['what']:<66} {row['value']:>9.3f} {row['unit']}")
        report = {"model": options.model, "at": time.time(), "rows": rows}
        (folder / f"{name}.json").write_text(json.dumps(report, indent=1))


main()
