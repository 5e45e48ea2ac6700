"""The contract: every request and response model of the service, once.

The same names stand in the URL, the SDK, the logs and the docs. Requests refuse unknown fields;
responses may grow new ones, so clients must ignore what they do not know.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from safelatent.safety import (
    CONCEPT,
    LEVELS,
    Level,
    Number,
    SafetyParameters,
    why_it_cannot_act,
)

SCHEMA_VERSION = 1

MAX_IMAGES = 8
MAX_STEPS = 500
MAX_SIZE = 2048
MAX_TEXT = 10_000
MAX_METADATA_BYTES = 16_000
MAX_URL = 2_000

Scheduler = Literal[
    "ddim",
    "pndm",
    "euler",
    "euler_a",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "unipc",
    "heun",
    "ddpm",
    "lcm",
]
Priority = Literal["high", "normal", "low"]
ImageFormat = Literal["png", "webp", "jpeg"]
Telemetry = Literal["none", "summary", "steps", "heatmap"]
Size = Annotated[int, Field(ge=8, le=MAX_SIZE), Number]


class Status(StrEnum):
    """Where a generation stands. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in (Status.SUCCEEDED, Status.FAILED, Status.CANCELLED)


class _Request(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,  # a log that has the error must not have the prompt
    )


class _Response(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class SafetyRequest(_Request):
    """What the caller asks of Safe Latent Diffusion and of the image checks."""

    level: Level = "medium"
    """The paper's `weak`, `medium`, `strong` or `max`; `custom` with `parameters`; or `off`."""
    concepts: list[Annotated[str, StringConstraints(min_length=1, max_length=MAX_TEXT)]] = Field(
        default_factory=lambda: [CONCEPT], min_length=1, max_length=8
    )
    """Texts to steer away from. With several, each step acts on the one nearest to the prompt."""
    parameters: SafetyParameters | None = None
    """The numbers of level `custom`; the other levels have the paper's."""
    checks: Literal["block", "report"] = "block"
    """Whether an image that a check flags is withheld, or delivered with the verdict."""
    telemetry: Telemetry = "summary"
    """How much of the guidance's telemetry the report holds; each word includes those before."""

    @model_validator(mode="after")
    def _custom_has_parameters(self) -> Self:
        if (self.level == "custom") != (self.parameters is not None):
            raise PydanticCustomError(
                "custom_parameters",
                "`parameters` are what level 'custom' needs, and no other takes; this is '{level}'",
                {"level": self.level, "field": "parameters", "value": self.parameters},
            )
        return self

    def effective_parameters(self) -> SafetyParameters | None:
        """The numbers that the engine will use; None when the level is `off`."""
        return None if self.level == "off" else self.parameters or LEVELS[self.level]


class GenerationRequest(_Request):
    """One prompt, `n` images. Image i uses seed + i."""

    prompt: Annotated[
        str, StringConstraints(max_length=MAX_TEXT), Field(json_schema_extra={"pattern": r"\S"})
    ]
    negative_prompt: Annotated[str, StringConstraints(max_length=MAX_TEXT)] = ""
    model: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    """Model id as listed by `GET /models`; null is the service's default."""
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES), Number] = 1
    seed: Annotated[int, Field(ge=0, le=2**32 - 1), Number] | None = None
    """Null draws one; the answer's `request` says which."""
    width: Size | None = None
    """Pixels, a multiple of the VAE's factor; null is the model's native size."""
    height: Size | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS), Number] = 50
    guidance_scale: Annotated[float, Field(ge=0, le=100), Number] = 7.5
    """Classifier-free guidance; up to 1 only the prompt is followed, and SLD cannot act."""
    scheduler: Scheduler | None = None
    """Null is the one that the checkpoint names."""
    safety: SafetyRequest = Field(default_factory=SafetyRequest)
    image_format: ImageFormat = "png"
    priority: Priority = "normal"
    deadline_s: Annotated[float, Field(gt=0, le=86_400), Number] | None = None
    """Not started within this many seconds, the generation fails and costs nothing."""
    metadata: dict[Annotated[str, StringConstraints(max_length=200)], str | int | float | bool] = (
        Field(default_factory=dict)
    )
    """The caller's own labels, echoed in the answer; 16 kB at most."""
    webhook: Annotated[str, StringConstraints(min_length=1, max_length=MAX_URL)] | None = None
    """An https URL that gets the generation as a signed POST when it has ended."""

    @property
    def megapixel_steps(self) -> float:
        """What it costs a worker: images x megapixels x steps. A size left open counts as 512."""
        pixels = (self.width or self.height or 512) * (self.height or self.width or 512)
        return self.n * pixels / 1e6 * self.steps

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise PydanticCustomError("empty", "should say what to draw, and is empty")
        return prompt

    @field_validator("metadata")
    @classmethod
    def _is_small(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        try:
            size = sum(len(f"{key}{value}".encode()) for key, value in metadata.items())
        except UnicodeEncodeError as error:
            raise PydanticCustomError("string_unicode", "should be valid Unicode") from error
        if size > MAX_METADATA_BYTES:
            text = f"metadata has {size} bytes: {MAX_METADATA_BYTES} at most"
            raise PydanticCustomError("too_large", text)
        return metadata

    @model_validator(mode="after")
    def _safety_can_act(self) -> Self:
        if parameters := self.safety.effective_parameters():
            why = why_it_cannot_act(
                parameters,
                self.safety.concepts,
                self.negative_prompt,
                self.guidance_scale,
                self.steps,
                self.scheduler,
            )
            if why:
                raise PydanticCustomError(
                    "safety_cannot_act",
                    "safety level '{level}' could not act: {why}",
                    {
                        "level": self.safety.level,
                        "why": why,
                        "field": "safety.level",
                        "value": self.safety.level,
                    },
                )
        return self


class FieldError(_Response):
    field: str
    """Path of the field, dots between names: `safety.parameters.threshold`."""
    message: str
    value: Any = None


class Problem(_Response):
    """An error, as RFC 9457 problem details."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = ""
    instance: str | None = None
    errors: list[FieldError] = Field(default_factory=list)


class Model(_Response):
    """A checkpoint that a worker holds."""

    id: str
    revision: str
    """Commit of the hub, or sha256 of the folder's content."""
    family: str
    prediction_type: str
    width: int
    height: int
    size_multiple: int
    """Width and height must be multiples of this (the VAE's factor)."""
    scheduler: str
    """The checkpoint's own scheduler, used when a request names none."""
    max_tokens: int
    """Tokens of a text that the text encoder reads, start and end included."""
    checks: list[str] = Field(default_factory=list)
    license: str | None = None
    """As the model card says it; null when it says nothing."""


class LoadedModel(Model):
    """A checkpoint, and who holds it."""

    workers: int
    """Worker processes that hold it warm now."""


class TextReport(_Response):
    """What the text encoder could not read of one text."""

    text: str
    tokens: int
    dropped: int = 0
    """Tokens beyond the encoder's limit; they had no effect."""
    dropped_text: str = ""
    unknown: int = 0
    """Words that the vocabulary does not know: most of their tokens are single letters or bytes, or
    they are the unknown token. What they mean is lost; their letters are read."""


class SafetyEffective(_Response):
    """What was done."""

    level: Level
    parameters: SafetyParameters | None
    concepts: list[str]
    applied: bool
    """True only if the safety guidance changed every image of the generation."""
    reason: str | None = None
    """Why `applied` is false."""
    warmup_share: float | None = None
    """Share of the denoiser calls that the warm-up covered, 0 to 1."""
    prediction_type: str
    model_revision: str
    texts: list[TextReport] = Field(default_factory=list)
    """Texts that were read only in part."""


class TelemetrySteps(_Response):
    """One number a denoiser call that had a concept row; `call` says which (from 0)."""

    call: list[int]
    concept: list[int]
    """Index of the concept that acted."""
    cosine: list[float]
    """Cosine of the prompt's direction (ep - e0) and the concept's (eS - e0), -1 to 1."""
    undone: list[float]
    """Share of the guidance that SLD takes back: <gamma, ep - e0> / |ep - e0|^2."""
    active: list[float]
    """Share of active elements (equation 5) less the share that symmetric noise would give."""
    momentum: list[float]
    """|s_m nu| / |gamma|: share of the momentum."""


class TelemetrySummary(_Response):
    """Means over the applied denoiser calls."""

    applied_calls: int
    calls: int
    cosine: float
    undone: float
    active: float
    momentum: float
    peak_call: int | None
    """The call that took back most."""


class Check(_Response):
    """One image check's verdict."""

    check: str
    version: str
    flagged: bool
    scores: dict[str, float] = Field(default_factory=dict)
    """Raw scores by category."""
    thresholds: dict[str, float] = Field(default_factory=dict)
    """A category is flagged where its score is above its threshold."""
    error: str | None = None
    """Set when the check could not judge; the image is then blocked."""


class ImageSafety(_Response):
    """What was seen on one image."""

    applied: bool
    summary: TelemetrySummary | None = None
    steps: TelemetrySteps | None = None
    heatmap_url: str | None = None
    checks: list[Check] = Field(default_factory=list)


class Blocked(_Response):
    """Why an image is withheld."""

    stage: Literal["output"] = "output"
    category: str
    check: str
    score: float | None
    threshold: float | None
    policy: str


class Image(_Response):
    index: int
    seed: int
    width: int
    height: int
    url: str | None = None
    """Absent when the image is blocked."""
    sha256: str | None = None
    media_type: str | None = None
    blocked: Blocked | None = None
    safety: ImageSafety


class Safety(_Response):
    requested: SafetyRequest
    effective: SafetyEffective


class PolicyApplied(_Response):
    """The policy that a request passed, and what it changed."""

    name: str
    sha256: str
    """Of the policy file."""
    raised: list[str] = Field(default_factory=list)
    """Fields that the policy made stricter."""


class Timings(_Response):
    """Seconds, by the worker's monotonic clock; `queue_s` by the clocks of frontend and worker."""

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    check_s: float
    total_s: float


class Place(_Response):
    """Where a queued generation stands."""

    position: int
    eta_s: float | None = None


class Started(_Response):
    started_at: datetime


class Progress(_Response):
    step: int
    steps: int


class Result(_Response):
    """What a worker leaves in Redis when a generation ends: the part of `Generation` it knows."""

    status: Status
    request: GenerationRequest
    model: Model
    images: list[Image] = Field(default_factory=list)
    safety: Safety | None = None
    timings: Timings | None = None
    error: Problem | None = None


class Delivery(_Response):
    """How far a webhook has come."""

    url: str
    status: Literal["pending", "delivered", "failed"] = "pending"
    attempts: int = 0
    last_status: int | None = None
    """HTTP status of the receiver's last answer."""
    last_error: str | None = None
    next_attempt_at: datetime | None = None


class Generation(_Response):
    """A generation, from the queue to its images."""

    id: str
    status: Status
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    position: int | None = None
    """How many queued generations start before it; null once it has left the queue."""
    eta_s: float | None = None
    """Seconds until it will have ended; null when it has, or before there is a measure."""
    progress: Progress | None = None
    request: GenerationRequest
    """As effective: defaults, seed and size filled in."""
    model: Model | None = None
    images: list[Image] = Field(default_factory=list)
    """While it runs those that are finished, without `safety.steps`. They stay if it then fails or
    is cancelled."""
    safety: Safety | None = None
    policy: PolicyApplied | None = None
    """Null for a service without a policy file."""
    timings: Timings | None = None
    error: Problem | None = None
    webhook: Delivery | None = None
    """Null without a webhook, and in the webhook's own body."""
    links: dict[str, str] = Field(default_factory=dict)


class GenerationPage(_Response):
    """Some of a tenant's generations, newest first."""

    data: list[Generation]
    next: str | None = None
    """The `cursor` of the next page; null when this is the last. A page may be short, or empty."""


class Capabilities(_Response):
    """What the calling tenant may ask of this service."""

    limits: dict[str, int | float | None]
    """The most of each; sizes in pixels, texts in characters, null is no limit. `weight` is the
    tenant's share of the workers beside the others' weights."""
    models: list[str]
    """Ids, as `GET /models` describes them."""
    schedulers: list[str]
    levels: dict[str, SafetyParameters | None]
    """Safety levels with their numbers; `off` and `custom` have none of their own."""
    concepts: list[str]
    """What is steered away from unless a request says otherwise."""
    concepts_fixed: bool
    """Whether a request may not say otherwise: the tenant has a floor."""
    floor: Level
    below_floor: Literal["refuse", "raise"]
    ceiling: Level
    checks: dict[str, list[str]]
    """The image checks of each model."""
    image_formats: list[str]
    telemetry: list[str]
    priorities: list[str]
    features: list[str]
