"""The frontend's settings, from the environment, read once."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from safelatent.defaults import DEFAULT_MODEL, DEFAULT_STORE_URL, model_id


class Settings(BaseSettings):
    """Environment variables are SAFELATENT_<NAME>, but for REDIS_URL.

    Without a policy file whoever reaches the port may use the service. So it then listens on
    loopback only, unless SAFELATENT_OPEN says that this is meant.
    """

    model_config = SettingsConfigDict(
        env_prefix="SAFELATENT_", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    redis_url: str = Field(validation_alias="REDIS_URL")
    """redis://, rediss:// or unix:// address of Redis or Valkey."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    model: str = DEFAULT_MODEL
    """Folder or hub id of the default model; only its name matters here."""
    store_url: str = DEFAULT_STORE_URL
    policy_file: Path | None = None
    """TOML with tenants, their keys and what they may ask for (service/policy.py)."""
    max_queued: int = Field(default=1000, ge=1)
    """Generations that may wait for a model at once, of all tenants together."""
    open: bool = False
    """Serve everybody who reaches a port that is not on loopback."""

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.policy_file or self.open or self.host in ("127.0.0.1", "::1", "localhost"):
            return self
        raise ValueError(
            f"SAFELATENT_HOST is {self.host}, and anyone who reaches it could use the service: "
            "name a policy file with API keys in SAFELATENT_POLICY_FILE (`safelatent key new` "
            "makes one), or set SAFELATENT_OPEN=1 where something else guards the port"
        )

    @property
    def model_id(self) -> str:
        """The default model's id."""
        return model_id(self.model)
