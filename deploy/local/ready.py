"""The last process of the local stack: says when it is ready, or makes the one picture of ONCE.

With ONCE it ends when the picture is saved, and the stack with it.
"""

import json
import os
import re
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

URL = os.environ["SAFELATENT_URL"]
KEY = " \\\n  -H 'Authorization: Bearer <key>'" if os.environ.get("SAFELATENT_POLICY_FILE") else ""
RULE = "=" * 74
READY = f"""
{RULE}
  safelatent is ready at {URL}

  Try it, in another terminal:

curl -sS {URL}/generate -H 'Prefer: wait=60'{KEY} \\
  -H 'Content-Type: application/json' -d '{{"prompt": "a cat on the moon"}}'

  A page to try it   make playground
  Every call         {URL}/docs
  Where to read on   docs/start.md, docs/troubleshooting.md
  Log each request   SAFELATENT_LOG_LEVEL=INFO make run
  Stop               Ctrl-C
{RULE}"""


def wait_until_ready() -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with direct.open(f"{URL}/readyz", timeout=5):
                return
        except OSError:  # refused, or 503 with what is missing
            time.sleep(0.2)


def generate(prompt: str) -> int:
    """Make, save and print one picture and its safety report."""
    import httpx

    from safelatent import errors
    from safelatent.client import Client

    try:
        with Client(URL, http_client=httpx.Client(trust_env=False)) as client:
            generation = client.generate(prompt)
            for image in generation.images:
                if image.blocked:
                    print(f"no picture: {image.blocked.model_dump_json()}")
                else:
                    print(image.save(free_path(prompt, image.seed)))
            report = {
                "safety": generation.safety and generation.safety.model_dump(mode="json"),
                "images": [image.safety.model_dump(mode="json") for image in generation.images],
            }
            print(json.dumps(report, indent=2, ensure_ascii=False))
    except errors.SafelatentError as error:
        print(f"safelatent: {error}")
        return 1
    return 0


def free_path(prompt: str, seed: int) -> Path:
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    return Path.cwd() / f"{words}-{seed}.png"


def main() -> int:
    wait_until_ready()
    if prompt := os.environ.get("ONCE"):
        return generate(prompt)
    print(READY)
    signal.pause()
    return 0


if __name__ == "__main__":
    sys.exit(main())
