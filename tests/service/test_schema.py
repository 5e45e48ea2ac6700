"""The OpenAPI document is true: schemathesis asks for what it describes, and for what it excludes.

Left out of schemathesis' checks, with the reason:
- positive data at the POSTs: a schema cannot say that a level needs a guidance scale above 1 and
  enough steps, that sizes are multiples of the model's, or which models there are;
- positive data in `cursor`: it is what a page has given, and no other text;
- authentication (`ignored_auth`): this service has no policy file; test_policy.py has one;
- methods and deletion (`unsupported_method`, `use_after_free`): test_wire.py, test_collection.py.
"""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from redis import Redis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    positive_data_acceptance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from safelatent.jobs import Jobs
from safelatent.store import Store, image_key
from service.app import create_app
from service.settings import Settings
from tests.service.played import CARD, SHA256, result, serving, work

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
    positive_data_acceptance,
]

app = create_app(Settings(redis_url="redis://nowhere", model="tiny", store_url="memory:///"))
document = copy.deepcopy(app.openapi())
for methods in document["paths"].values():
    for operation in methods.values():
        operation.pop("security", None)  # without a policy file a key is not asked for
schema = schemathesis.openapi.from_dict(document)


@pytest.fixture(scope="module")
def service(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A service whose worker does what is queued; and a generation of it that has ended."""
    store_url = f"file://{tmp_path_factory.mktemp('store')}"
    app = create_app(Settings(redis_url=redis_url, model="tiny", store_url=store_url))
    app.state.parts.waiting.look_every_s = 0.2
    stop = threading.Event()
    with Redis.from_url(redis_url) as connection, serving(app) as url:
        connection.flushall()
        Jobs(connection).announce("played", CARD, ttl_s=3600)
        here = httpx.post(f"{url}/generate", json={"prompt": "a cat"}, timeout=60).headers
        id = here["location"].split("/")[2]
        Store(store_url).put(image_key(id, 0, SHA256, "png"), Path("docs/levels.png").read_bytes())
        work(connection, result)

        def play() -> None:
            while not stop.wait(0.1):
                work(connection, result)

        thread = threading.Thread(target=play)
        thread.start()
        yield url, id
        stop.set()
        thread.join()


@schema.parametrize()
@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_the_document_says(
    case: schemathesis.Case, service: tuple[str, str]
) -> None:
    url, ended = service
    is_positive = case.meta is None or case.meta.generation.mode is GenerationMode.POSITIVE
    if is_positive and case.method == "GET" and "id" in (case.path_parameters or {}):
        case.path_parameters["id"] = ended
    is_unsayable = "cursor" in (case.query or {}) or case.method == "POST"
    excluded = [positive_data_acceptance] if is_unsayable else []
    response = case.call(base_url=url, timeout=60)
    case.validate_response(response, checks=CHECKS, excluded_checks=excluded)
