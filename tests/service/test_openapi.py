"""The committed OpenAPI document is the service's own, and no change of it breaks a client."""

import copy
import json
from typing import Any

import pytest

from service.openapi import FILE, Comparison, document

BEFORE: dict[str, Any] = json.loads(FILE.read_text())
TO_WRITE = "run `make openapi` (python -m service.openapi) and commit docs/openapi.json"


def test_nothing_that_clients_rely_on_is_gone() -> None:
    breaks = list(Comparison(BEFORE, document()).breaks())
    assert not breaks, f"clients would break; if that is meant, {TO_WRITE}, with --break"


def test_the_committed_document_is_the_services_own() -> None:
    assert document() == BEFORE, f"docs/openapi.json is not up to date: {TO_WRITE}"


def schemas(document: dict[str, Any]) -> Any:
    return document["components"]["schemas"]


def operation(document: dict[str, Any]) -> Any:
    return document["paths"]["/generations"]["get"]


BREAKS = {
    "GET /models is gone": lambda d: d["paths"].pop("/models"),
    "DELETE /generations/{id} is gone": lambda d: d["paths"]["/generations/{id}"].pop("delete"),
    "has no parameter status any more": lambda d: operation(d).update(
        parameters=[p for p in operation(d)["parameters"] if p["name"] != "status"]
    ),
    "needs the parameter limit": lambda d: operation(d)["parameters"][0].update(required=True),
    "does not answer 202": lambda d: d["paths"]["/generate"]["post"]["responses"].pop("202"),
    "has no image/webp any more": lambda d: d["paths"]["/generate"]["post"]["responses"]["200"][
        "content"
    ].pop("image/webp"),
    "scheduler has not lcm any more": lambda d: schemas(d)["GenerationRequest"]["properties"][
        "scheduler"
    ]["anyOf"][0]["enum"].remove("lcm"),
    "POST /generate needs seed": lambda d: schemas(d)["GenerationRequest"]["required"].append(
        "seed"
    ),
    "n has maximum 4, and had 8": lambda d: schemas(d)["GenerationRequest"]["properties"][
        "n"
    ].update(maximum=4),
    "prompt has minLength 3, and had none": lambda d: schemas(d)["GenerationRequest"]["properties"][
        "prompt"
    ].update(minLength=3),
    "seed does not take null any more": lambda d: schemas(d)["GenerationRequest"]["properties"][
        "seed"
    ].update(anyOf=[{"type": "integer"}]),
    "has no field sha256 any more": lambda d: schemas(d)["Image"]["properties"].pop("sha256"),
    "seed can now be null": lambda d: schemas(d)["Image"]["properties"]["seed"].update(
        anyOf=[{"type": "integer"}, {"type": "null"}]
    ),
    "may be without index": lambda d: schemas(d)["Image"]["required"].remove("index"),
}


@pytest.mark.parametrize(("said", "change"), BREAKS.items(), ids=BREAKS)
def test_what_breaks_a_client_is_said(said: str, change: Any) -> None:
    after = copy.deepcopy(BEFORE)
    change(after)
    found = list(Comparison(BEFORE, after).breaks())
    assert any(said in each for each in found), found


def test_what_is_new_breaks_nobody() -> None:
    after = copy.deepcopy(BEFORE)
    schemas(after)["Image"]["properties"]["new"] = {"type": "string"}
    schemas(after)["GenerationRequest"]["properties"]["new"] = {"type": "string"}
    schemas(after)["GenerationRequest"]["properties"]["n"]["maximum"] = 16
    after["paths"]["/new"] = after["paths"]["/models"]
    operation(after)["responses"]["429"] = operation(after)["responses"]["422"]
    assert list(Comparison(BEFORE, after).breaks()) == []
