"""The fields of a request as keyword arguments: what an editor completes and mypy checks.

The service is the judge of their values; a test keeps these names those of `GenerationRequest`.
"""

from typing import TypedDict

from safelatent.safety import Level, SafetyParameters
from safelatent.schema import ImageFormat, Priority, SafetyRequest, Scheduler, Telemetry


class SafetyParameterFields(TypedDict):
    guidance_scale: float
    warmup_steps: int
    threshold: float
    momentum_scale: float
    mom_beta: float


class SafetyFields(TypedDict, total=False):
    level: Level
    concepts: list[str]
    parameters: SafetyParameters | SafetyParameterFields
    checks: str
    telemetry: Telemetry


class RequestFields(TypedDict, total=False):
    negative_prompt: str
    model: str
    n: int
    seed: int
    width: int
    height: int
    steps: int
    guidance_scale: float
    scheduler: Scheduler
    safety: Level | SafetyFields | SafetyRequest
    """A level alone is short for `{"level": ...}`."""
    image_format: ImageFormat
    priority: Priority
    deadline_s: float
    metadata: dict[str, str | int | float | bool]
    webhook: str
