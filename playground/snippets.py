"""The very request that was made, to copy: as cURL and as Python."""

import json
import shlex
from typing import Any


def curl(body: dict[str, Any], url: str, has_key: bool) -> str:
    """Waits for the end of the generation; prints it."""
    key = '  -H "Authorization: Bearer $SAFELATENT_API_KEY" \\\n' if has_key else ""
    content = json.dumps(body, indent=2, ensure_ascii=False)
    return (
        f"curl -sS {shlex.quote(url + '/generate')} \\\n{key}"
        "  -H 'Content-Type: application/json' -H 'Prefer: wait=60' \\\n"
        f"  -d {shlex.quote(content)}\n"
    )


def python(body: dict[str, Any], url: str, has_key: bool) -> str:
    """Saves the picture, and prints what safety did."""
    key = "  # with SAFELATENT_API_KEY in the environment" if has_key else ""
    fields = "".join(
        f"        {name}={value!r},\n" for name, value in body.items() if name != "prompt"
    )
    return (
        f"from safelatent.client import Client\n\n"
        f"with Client({url!r}) as client:{key}\n"
        f"    generation = client.generate(\n        {body['prompt']!r},\n{fields}    )\n"
        f"    print(generation.safety)\n"
        f"    for image in generation.images:\n"
        f"        if image.blocked:\n"
        f"            print(image.blocked)\n"
        f"        else:\n"
        f'            image.save(f"{{image.seed}}.png")\n'
    )
