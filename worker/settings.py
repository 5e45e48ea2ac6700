"""The worker's settings, from the environment, read once.

The supervisor reads them too, so nothing here imports torch before a method needs it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from safelatent import logs
from safelatent.connecting import readable
from safelatent.defaults import DEFAULT_MODEL, DEFAULT_STORE_URL

if TYPE_CHECKING:
    import torch

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Settings(BaseSettings):
    """Environment variables are SAFELATENT_<NAME>, but for REDIS_URL."""

    model_config = SettingsConfigDict(env_prefix="SAFELATENT_", frozen=True)

    redis_url: Annotated[str, AfterValidator(readable)] = Field(validation_alias="REDIS_URL")
    """Address of Redis or Valkey: redis://, rediss:// or unix://, or its sentinels' as
    redis+sentinel://host:26379,host:26379/master/0."""
    model: str = DEFAULT_MODEL
    """Folder or hub id of the checkpoint, in diffusers' layout."""
    model_revision: str | None = None
    """What the revision must be: a folder's content hash, as GET /models reports it; for a hub id
    the commit, tag or branch to take."""
    device: str | None = None
    """A torch device; unset is cuda where there is one, else cpu."""
    dtype: str | None = None
    """fp32, fp16 or bf16; unset is fp16 on cuda and fp32 elsewhere."""
    slots: PositiveInt = 8
    """Generations in flight."""
    max_rows: PositiveFloat = 24
    """Rows of the native size in one denoiser call; a guided image with SLD has three."""
    store_url: str = DEFAULT_STORE_URL
    """Where images live: file://, s3://, gs://, az:// or memory://; the same for frontends."""
    grace_s: NonNegativeFloat = 60
    """How long a worker that is asked to end lets its generations run before it hands them back."""
    stall_s: PositiveFloat | None = None
    """A denoising step that takes longer is a hang; unset goes by what steps take."""
    load_timeout_s: PositiveFloat = 1800
    """A worker that takes longer to get warm hangs. It has to be enough for a download, where the
    checkpoint comes from the hub."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics port."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Where /metrics is served for Prometheus; 0 is nowhere."""
    log_level: logs.Level = "INFO"
    """Least level of the log's lines."""
    log_format: logs.Format | None = None
    """json or console; unset is console on a terminal and json elsewhere."""
    log_prompts: bool = False
    """Whether the log's line of a job has its prompt."""

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str | None) -> str | None:
        if dtype not in (None, *DTYPES):
            raise ValueError(f"{dtype!r} is none of {', '.join(DTYPES)}")
        return dtype

    def torch_device(self) -> torch.device:
        """The device; UnusableModel when it is none, or not here."""
        import torch

        from worker.families import UnusableModel

        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            said = str(error).splitlines()[0]
            raise UnusableModel(f"SAFELATENT_DEVICE: {name!r} cannot be used: {said}") from error

    def torch_dtype(self) -> torch.dtype:
        import torch

        name = self.dtype or ("fp16" if self.torch_device().type == "cuda" else "fp32")
        dtype: torch.dtype = getattr(torch, DTYPES[name])
        return dtype


def read() -> Settings | None:
    """The settings; None when one cannot be, and then stderr says which and why."""
    try:
        return Settings()  # type: ignore[call-arg]
    except ValidationError as error:
        for wrong in error.errors():
            name = str(wrong["loc"][0])
            name = name if name.isupper() else f"SAFELATENT_{name.upper()}"
            said = wrong["msg"].removeprefix("Value error, ")
            print(f"safelatent worker: {name}: {said}", file=sys.stderr)
        return None
