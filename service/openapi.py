"""The OpenAPI document as a file, and what a change of it would break: `python -m service.openapi`.

The file is written anew unless that would break a client; then the breaks are listed, and only
`--break` writes it.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from service.app import create_app
from service.settings import Settings

FILE = Path(__file__).parents[1] / "docs" / "openapi.json"

NARROWER: dict[str, Callable[[Any, Any], bool]] = {
    "maximum": lambda old, new: new < old,
    "exclusiveMaximum": lambda old, new: new < old,
    "maxLength": lambda old, new: new < old,
    "maxItems": lambda old, new: new < old,
    "minimum": lambda old, new: new > old,
    "exclusiveMinimum": lambda old, new: new > old,
    "minLength": lambda old, new: new > old,
    "minItems": lambda old, new: new > old,
    "pattern": lambda old, new: new != old,
}
"""Whether a new limit of a request refuses what the old one took."""
FREE = {"max": float("inf"), "min": float("-inf")}

Json = dict[str, Any]


def document() -> Json:
    """The document of a service with any settings."""
    settings = Settings(redis_url="redis://127.0.0.1", store_url="memory:///")
    return create_app(settings).openapi()


def text(document: Json) -> str:
    """As the file has it."""
    return json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


class Comparison:
    """What of an old document a new one breaks, a sentence each.

    Answers may grow fields, statuses and enum values, as clients must ignore what they do not
    know; requests may grow optional ones.
    """

    def __init__(self, old: Json, new: Json):
        self.old = old
        self.new = new
        self._seen: set[tuple[str, str, bool]] = set()

    def breaks(self) -> Iterator[str]:
        for path, methods in self.old["paths"].items():
            for method, old in methods.items():
                here = f"{method.upper()} {path}"
                new = self.new["paths"].get(path, {}).get(method)
                if new is None:
                    yield f"{here} is gone"
                else:
                    yield from self._operation(here, old, new)

    def _operation(self, here: str, old: Json, new: Json) -> Iterator[str]:
        before, after = ({p["name"]: p for p in op.get("parameters", ())} for op in (old, new))
        for name in before.keys() - after.keys():
            yield f"{here} has no parameter {name} any more"
        for name, parameter in after.items():
            was = before.get(name, {})
            if parameter.get("required") and not was.get("required"):
                yield f"{here} needs the parameter {name}"
            if was:
                yield from self._schema(
                    f"{here} {name}", was["schema"], parameter["schema"], is_request=True
                )
        yield from self._content(here, old.get("requestBody"), new.get("requestBody"), True)
        for status, answer in old["responses"].items():
            if status.startswith("2") and status not in new["responses"]:
                yield f"{here} does not answer {status} any more"
            yield from self._content(
                f"{here} {status}", answer, new["responses"].get(status), is_request=False
            )

    def _content(
        self, here: str, old: Json | None, new: Json | None, is_request: bool
    ) -> Iterator[str]:
        before, after = (((each or {}).get("content") or {}) for each in (old, new))
        if new is None:
            return
        for kind, media in before.items():
            if kind not in after:
                yield f"{here} has no {kind} any more"
            else:
                a, b = media.get("schema", {}), after[kind].get("schema", {})
                yield from self._schema(here, a, b, is_request)

    def _schema(self, here: str, old: Json, new: Json, is_request: bool) -> Iterator[str]:
        names = old.get("$ref"), new.get("$ref")
        if names[0] and names[1]:
            seen = names[0], names[1], is_request
            if seen in self._seen:
                return
            self._seen.add(seen)
        before, after = _kinds(self.old, old), _kinds(self.new, new)
        if is_request and "any" not in after and (gone := before.keys() - after.keys()):
            yield f"{here} does not take {', '.join(sorted(gone))} any more"
        if not is_request and "any" not in before and (come := after.keys() - before.keys()):
            yield f"{here} can now be {', '.join(sorted(come))}"
        for kind in before.keys() & after.keys():
            yield from self._branch(here, before[kind], after[kind], is_request)

    def _branch(self, here: str, old: Json, new: Json, is_request: bool) -> Iterator[str]:
        gone = set(old.get("enum", ())) - set(new.get("enum") or old.get("enum", ()))
        if gone:
            yield f"{here} has not {', '.join(sorted(map(str, gone)))} any more"
        if is_request:
            if "enum" in new and "enum" not in old:
                yield f"{here} takes only {', '.join(map(str, new['enum']))}"
            for name, is_narrower in NARROWER.items():
                free = FREE.get(name.removeprefix("exclusive").lower()[:3])
                if name in new and is_narrower(old.get(name, free), new[name]):
                    yield f"{here} has {name} {new[name]}, and had {old.get(name, 'none')}"
        before, after = old.get("properties", {}), new.get("properties", {})
        for name, schema in before.items():
            if name not in after:
                yield f"{here} has no field {name} any more"
            else:
                yield from self._schema(f"{here} {name}", schema, after[name], is_request)
        needed = set(old.get("required", ())), set(new.get("required", ()))
        if is_request and (more := needed[1] - needed[0]):
            yield f"{here} needs {', '.join(sorted(more))}"
        if not is_request and (less := (needed[0] - needed[1]) & after.keys()):
            yield f"{here} may be without {', '.join(sorted(less))}"
        for part in ("items", "additionalProperties"):
            a, b = old.get(part), new.get(part)
            if isinstance(a, dict) and isinstance(b, dict):
                yield from self._schema(f"{here}[]", a, b, is_request)


def _kinds(document: Json, schema: Json) -> dict[str, Json]:
    """The alternatives of a schema by their type."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    found: dict[str, Json] = {}
    for each in schema.get("anyOf") or schema.get("oneOf") or ():
        found |= _kinds(document, each)
    return found or {schema.get("type", "any"): schema}


def main() -> int:
    new = document()
    if FILE.exists() and "--break" not in sys.argv:
        if breaks := list(Comparison(json.loads(FILE.read_text()), new).breaks()):
            print("This would break clients (--break writes it all the same):", file=sys.stderr)
            print(*breaks, sep="\n", file=sys.stderr)
            return 1
    FILE.write_text(text(new))
    return 0


if __name__ == "__main__":
    sys.exit(main())
