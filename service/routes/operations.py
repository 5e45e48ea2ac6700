"""Whether the service lives, whether it can work, and what its problems mean."""

import inspect

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel

from safelatent.errors import (
    ERRORS,
    PROBLEM_TYPE,
    InvalidRequest,
    NotFound,
    NotReady,
    QueueUnavailable,
)
from service.advice import ADVICE
from service.parts import TheParts
from service.problems import documented

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    status: str = "ok"


class Readiness(BaseModel):
    status: str = "ready"
    model: str
    workers: int


class ProblemType(BaseModel):
    type: str
    title: str
    status: int
    explanation: str
    cause: str | None = None
    """The usual one; a problem that only stands for others has none, and no cure."""
    cure: str | None = None


@router.get("/healthz", summary="Is the process alive?", responses=documented())
async def healthz() -> Health:
    """Looks at nothing else: a restart would not bring Redis back."""
    return Health()


@router.get("/readyz", summary="Can a generation be made now?", responses=documented(NotReady))
def readyz(parts: TheParts) -> Readiness:
    """Ready when Redis answers and a worker holds the default model warm."""
    model = parts.settings.model_id
    try:
        loaded = parts.jobs.loaded()
    except QueueUnavailable as error:
        raise NotReady("missing: Redis, which does not answer", retry_after_s=2) from error
    if model not in loaded:
        raise NotReady(f"missing: a worker that holds the model {model!r} warm", retry_after_s=2)
    return Readiness(model=model, workers=loaded[model])


@router.get("/metrics", include_in_schema=False)
def metrics(request: Request, parts: TheParts) -> Response:
    """For Prometheus. They name tenants: where there are any, a port that all reach has none."""
    if parts.settings.policy_file is not None:
        raise NotFound("with a policy file metrics are on SAFELATENT_METRICS_PORT alone")
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(parts.metrics.registry), media_type=media_type)


@router.get(
    "/problems/{slug}",
    summary="Explain a problem type",
    responses=documented(NotFound, InvalidRequest),
)
async def explain(slug: str) -> ProblemType:
    """What the `type` of a problem means, its usual cause, and what to do."""
    if slug not in ERRORS:
        raise NotFound(f"there is no problem {slug!r}; there are: {', '.join(ERRORS)}")
    cls = ERRORS[slug]
    cause, cure = ADVICE.get(slug, (None, None))
    return ProblemType(
        type=PROBLEM_TYPE + slug,
        title=cls.title,
        status=cls.status,
        explanation=inspect.getdoc(cls) or "",
        cause=cause,
        cure=cure,
    )
