"""`safelatent.webhooks`: genuine calls pass, by the standard's own package too, and no others."""

import base64
import secrets
import time
from datetime import UTC, datetime

import pytest
from standardwebhooks.webhooks import Webhook

from safelatent import errors, webhooks
from safelatent.schema import Generation, GenerationRequest, Status

SECRET, OTHER = (
    "whsec_" + base64.b64encode(secrets.token_bytes(size)).decode() for size in (24, 64)
)
GENERATION = Generation(
    id="1",
    status=Status.SUCCEEDED,
    created_at=datetime.now(UTC),
    request=GenerationRequest(prompt="a cât"),
)
EVENT = webhooks.Event(type="generation.succeeded", timestamp=datetime.now(UTC), data=GENERATION)
BODY = EVENT.model_dump_json().encode()


def test_ours_is_the_standards() -> None:
    headers = webhooks.signed("msg_1", BODY, [SECRET, OTHER])
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify(BODY, headers)["data"]["id"] == "1"
    theirs = Webhook(SECRET).sign("msg_2", datetime.now(UTC), BODY.decode())
    headers = {
        "Webhook-Id": "msg_2",
        "Webhook-Timestamp": str(int(time.time())),
        "Webhook-Signature": f"v1a,unknown {theirs}",
    }
    assert webhooks.verify(BODY, headers, SECRET) == GENERATION
    assert webhooks.verify(BODY, headers, [OTHER, SECRET]) == GENERATION


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"webhook-id": "msg_2"}, "no signature"),
        ({"webhook-timestamp": "1"}, "no signature"),
        ({"webhook-timestamp": "soon"}, "no time"),
        ({"webhook-timestamp": "²"}, "no time"),
        ({"webhook-timestamp": "9" * 5000}, "no time"),
        ({"webhook-signature": ""}, "no signature"),
        ({"webhook-signature": "v1"}, "no signature"),
        ({"webhook-signature": "v1,é v1,====="}, "no signature"),
    ],
)
def test_a_changed_header_is_refused(changed: dict[str, str], said: str) -> None:
    headers = webhooks.signed("msg_1", BODY, [SECRET])
    with pytest.raises(errors.BadSignature, match=said):
        webhooks.verify(BODY, headers | changed, SECRET)
    for name in changed:
        with pytest.raises(errors.BadSignature, match=name):
            webhooks.verify(BODY, {k: v for k, v in headers.items() if k != name}, SECRET)


def test_another_body_another_secret_and_another_time_are_refused() -> None:
    headers = webhooks.signed("msg_1", BODY, [SECRET])
    with pytest.raises(errors.BadSignature, match="no signature"):
        webhooks.verify(BODY + b" ", headers, SECRET)
    with pytest.raises(errors.BadSignature, match="no signature"):
        webhooks.verify(BODY, headers, OTHER)
    with pytest.raises(errors.BadSignature, match="no signature"):
        webhooks.verify(BODY, headers, [])
    for away in (-301, 301):
        with pytest.raises(errors.BadSignature, match="300 s"):
            webhooks.verify(BODY, headers, SECRET, now=int(headers["webhook-timestamp"]) + away)
    headers = webhooks.signed("msg_1", b"{}", [SECRET])
    with pytest.raises(errors.BadSignature, match="no event"):
        webhooks.verify(b"{}", headers, SECRET)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_canary", "canary" * 8, "whsec_c4n4ry=="])
def test_a_secret_that_is_none_is_refused_and_not_shown(secret: str) -> None:
    with pytest.raises(ValueError, match="whsec_") as refused:
        webhooks.verify(BODY, {}, secret)
    assert "canary" not in str(refused.value) and "c4n4ry" not in str(refused.value)
