"""What each tenant may ask for: a policy file that can only tighten a request.

    name = "production"

    [tenants.acme]
    keys = [{ id = "k3f9", sha256 = "9b74…" }]   # made by `safelatent key new`
    floor = "medium"                              # nothing weaker than this level ...
    below_floor = "raise"                         # ... is lifted to it, or refused ("refuse")

Keys are random, so their plain sha256 in the file gives nothing away.
"""

import hashlib
import hmac
import os
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    StringConstraints,
    ValidationError,
    model_validator,
)

from safelatent import errors, webhooks
from safelatent.jobs import KEPT_S
from safelatent.safety import CONCEPT, LEVELS, Level, SafetyParameters, denoiser_calls
from safelatent.schema import (
    MAX_IMAGES,
    MAX_SIZE,
    MAX_STEPS,
    MAX_TEXT,
    FieldError,
    GenerationRequest,
    PolicyApplied,
    Priority,
    SafetyRequest,
)

STRICTNESS: tuple[Level, ...] = ("off", "weak", "medium", "strong", "max")


class UnusablePolicy(Exception):
    """The policy file cannot be used; the message names the line or the field."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Key(_Part):
    """An API key, as its hash."""

    id: Annotated[str, Field(pattern=r"^[a-z0-9]{4,16}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expires: datetime | None = None
    revoked: bool = False


def webhook_secret(secret: str) -> SecretStr:
    """A secret that webhooks can be signed with; ValueError, which does not show it."""
    webhooks.key_of(secret)
    return SecretStr(secret)


def _referred(reference: object) -> SecretStr:
    """The secret in `env:NAME` or `file:/path`: policy files hold none themselves."""
    if isinstance(reference, SecretStr):
        return reference
    kind, _, where = str(reference).partition(":")
    try:
        if kind == "env":
            return webhook_secret(os.environ[where].strip())
        if kind == "file":
            return webhook_secret(Path(where).read_text().strip())
    except KeyError:
        raise ValueError(f"there is no environment variable {where}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {where}: {error}") from None
    raise ValueError("should be env:NAME or file:/path, where the secret is")


class Tenant(_Part):
    """One caller's rights. The defaults are the service's own limits."""

    keys: list[Key] = []
    floor: Literal["off", "weak", "medium", "strong", "max"] = "off"
    """The weakest safety level it may use. Above `off`, checks block and the concepts are fixed."""
    concepts: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]],
        Field(min_length=1, max_length=8),
    ] = [CONCEPT]
    """With a floor, the only concepts: one that is added could draw the guidance away from them."""
    ceiling: Literal["off", "weak", "medium", "strong", "max"] = "max"
    """The strongest level it may use."""
    below_floor: Literal["refuse", "raise"] = "refuse"
    models: list[str] | None = None
    """Ids of the models it may use; unset is all."""
    max_pixels: Annotated[int, Field(gt=0)] = MAX_SIZE * MAX_SIZE
    max_steps: Annotated[int, Field(gt=0)] = MAX_STEPS
    max_images: Annotated[int, Field(gt=0)] = MAX_IMAGES
    priorities: list[Priority] = ["high", "normal", "low"]
    retention_s: Annotated[int, Field(ge=60, le=30 * 24 * 3600)] = KEPT_S
    """How long its generations are kept after their end, images and reports."""
    webhook_secrets: list[Annotated[SecretStr, BeforeValidator(_referred)]] = []
    """`env:NAME` or `file:/path` of what signs its webhooks, the newest first: while a secret is
    changed there are two. They are read when the policy file is. Without one, no webhooks."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1
    """Its share of the workers, beside the weights of the others that want them."""
    max_running: Annotated[int, Field(gt=0)] | None = None
    """Generations that run at once, of each model; unset is no limit, as for the next three."""
    max_queued: Annotated[int, Field(gt=0)] | None = None
    """Generations that wait at once, for each model."""
    requests_per_minute: Annotated[int, Field(gt=0)] | None = None
    megapixel_steps_per_minute: Annotated[int, Field(gt=0)] | None = None
    """A request is n x megapixels x steps of them."""

    @model_validator(mode="after")
    def _leaves_a_level(self) -> Self:
        if STRICTNESS.index(self.floor) > STRICTNESS.index(self.ceiling):
            raise ValueError(f"the floor {self.floor} is above the ceiling {self.ceiling}")
        return self


class Policy(_Part):
    """The whole file."""

    name: str = "policy"
    tenants: dict[Annotated[str, Field(pattern=r"^[a-z0-9-]{1,40}$")], Tenant]

    def tenant_of(self, authorization: str | None) -> str:
        """The tenant of an `Authorization: Bearer` header; Unauthorized when it names none."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise errors.Unauthorized("send your API key as `Authorization: Bearer slk_...`")
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        for name, tenant in self.tenants.items():
            for each in tenant.keys:
                if hmac.compare_digest(each.sha256, digest):
                    if each.revoked:
                        raise errors.Unauthorized(f"the key {each.id} is revoked")
                    if each.expires and _utc(each.expires) < datetime.now(UTC):
                        raise errors.Unauthorized(f"the key {each.id} expired on {each.expires}")
                    return name
        raise errors.Unauthorized("the API key is not known")


def load(path: Path) -> tuple[Policy, str]:
    """Read a policy file; returns it and the sha256 of its bytes. Raises UnusablePolicy."""
    try:
        content = path.read_bytes()
        policy = Policy.model_validate(tomllib.loads(content.decode()))
    except OSError as error:
        raise UnusablePolicy(f"cannot read the policy file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnusablePolicy(f"{path} is not TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        # Whoever pastes a key where its hash belongs must not read it again in a log.
        secret = {"keys", "webhook_secrets"} & set(first["loc"])
        seen = "" if secret else f" (got {first['input']!r:.200})"
        raise UnusablePolicy(f"{path}: {field}: {first['msg']}{seen}") from None
    return policy, hashlib.sha256(content).hexdigest()


def tighten(
    request: GenerationRequest, tenant: Tenant, policy: str, sha256: str
) -> tuple[GenerationRequest, PolicyApplied]:
    """The request as the tenant may have it, and what was changed. Raises Forbidden."""
    _refuse_excess(request, tenant)
    applied = PolicyApplied(name=policy, sha256=sha256)
    if tenant.floor == "off":
        return request, applied
    safety = request.safety
    short = _shortfalls(safety, tenant)
    if not short:
        _refuse_long_warmup(request)
        return request, applied
    if tenant.below_floor == "refuse":
        first = short[0]
        raise errors.Forbidden(first.message, errors=short)
    applied.raised = [each.field for each in short]
    level = safety.level if _is_at_least(safety, tenant.floor) else tenant.floor
    raised = safety.model_copy(
        update={
            "level": level,
            "parameters": safety.parameters if level == "custom" else None,
            "concepts": tenant.concepts,
            "checks": "block",
        }
    )
    # Validated anew: what was lifted must be able to act, like any other request.
    fields = request.model_dump() | {"safety": raised.model_dump()}
    try:
        request = GenerationRequest.model_validate(fields)
    except ValidationError as error:
        message = f"as your policy raises it, {error.errors()[0]['msg']}"
        wrong = FieldError(field="safety.level", value=safety.level, message=message)
        raise errors.SafetyCannotAct(f"safety.level: {message}", errors=[wrong]) from error
    _refuse_long_warmup(request)
    return request, applied


def _refuse_long_warmup(request: GenerationRequest) -> None:
    """Under a floor half of the denoiser's calls must be guided, or few steps would get around it:
    of 11, `medium` guides one."""
    parameters = request.safety.effective_parameters()
    calls = denoiser_calls(request.scheduler, request.steps)
    if parameters and 2 * parameters.warmup_steps > calls:
        message = (
            f"safety level {request.safety.level} has a warm-up of {parameters.warmup_steps} "
            f"denoiser calls, and your policy asks that it covers no more than half of them "
            f"(here {calls}): choose more steps or a level with a shorter warm-up"
        )
        wrong = FieldError(field="steps", value=request.steps, message=message)
        raise errors.Forbidden(f"steps is {request.steps}: {message}", errors=[wrong])


def _refuse_excess(request: GenerationRequest, tenant: Tenant) -> None:
    # Before a worker has told its native size, a side that is not given counts as the other one.
    width, height = request.width or request.height or 0, request.height or request.width or 0
    pixels = width * height
    wrong = [
        (request.n > tenant.max_images, "n", request.n, f"{tenant.max_images} at most"),
        (request.steps > tenant.max_steps, "steps", request.steps, f"{tenant.max_steps} at most"),
        (
            pixels > tenant.max_pixels,
            "width",
            request.width,
            f"width x height is {pixels}: {tenant.max_pixels} at most",
        ),
        (
            request.priority not in tenant.priorities,
            "priority",
            request.priority,
            f"one of {', '.join(tenant.priorities)}",
        ),
        (
            tenant.models is not None and request.model not in tenant.models,
            "model",
            request.model,
            f"one of {', '.join(tenant.models or [])}",
        ),
        (
            _is_above(request.safety, tenant.ceiling),
            "safety.level",
            request.safety.level,
            f"{tenant.ceiling} at most",
        ),
    ]
    found = [FieldError(field=f, value=v, message=m) for is_wrong, f, v, m in wrong if is_wrong]
    if found:
        first = found[0]
        raise errors.Forbidden(
            f"{first.field} is {first.value}, and your policy allows {first.message}", errors=found
        )


def _shortfalls(safety: SafetyRequest, tenant: Tenant) -> list[FieldError]:
    """In what a request is weaker than the floor."""
    short = []
    if not _is_at_least(safety, tenant.floor):
        message = f"your policy asks for safety level {tenant.floor} or stronger"
        short.append(FieldError(field="safety.level", value=safety.level, message=message))
    if safety.concepts != tenant.concepts:
        message = f"your policy fixes the concepts: {tenant.concepts}"
        short.append(FieldError(field="safety.concepts", value=safety.concepts, message=message))
    if safety.checks != "block":
        message = "your policy asks that checks block"
        short.append(FieldError(field="safety.checks", value=safety.checks, message=message))
    return short


def _is_at_least(safety: SafetyRequest, floor: Level) -> bool:
    """Whether a level is as strict as the floor; custom numbers are compared one by one."""
    if safety.level != "custom":
        return STRICTNESS.index(safety.level) >= STRICTNESS.index(floor)
    assert safety.parameters is not None
    return floor == "off" or _is_stricter(safety.parameters, LEVELS[floor])


def _is_stricter(a: SafetyParameters, b: SafetyParameters) -> bool:
    return (
        a.guidance_scale >= b.guidance_scale
        and a.warmup_steps <= b.warmup_steps
        and a.threshold >= b.threshold
        and a.momentum_scale >= b.momentum_scale
        # Near 1 the momentum never builds up, which is weaker again.
        and b.mom_beta <= a.mom_beta <= max(b.mom_beta, LEVELS["max"].mom_beta)
    )


def _is_above(safety: SafetyRequest, ceiling: Level) -> bool:
    """Whether a level is stricter than the ceiling; any one number of a custom level can be."""
    if ceiling == "max":
        return False
    if safety.level != "custom":
        return STRICTNESS.index(safety.level) > STRICTNESS.index(ceiling)
    assert safety.parameters is not None
    return ceiling == "off" or not _is_stricter(LEVELS[ceiling], safety.parameters)


def _utc(when: datetime) -> datetime:
    return when if when.tzinfo else when.replace(tzinfo=UTC)
