"""The playground's settings, from the environment, read once."""

from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Environment variables are SAFELATENT_PLAYGROUND_<NAME>, but for the client's two.

    Whoever reaches the page asks with its API key. So it listens on loopback only, unless
    SAFELATENT_PLAYGROUND_OPEN says that something else guards the port.
    """

    model_config = SettingsConfigDict(
        env_prefix="SAFELATENT_PLAYGROUND_",
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )

    url: str = Field(default="http://127.0.0.1:8000", validation_alias="SAFELATENT_URL")
    """Where the service is, as this process reaches it."""
    api_key: SecretStr | None = Field(default=None, validation_alias="SAFELATENT_API_KEY")
    """Sent to the service; never shown on the page."""
    public_url: str | None = None
    """Where the service is for those who copy a request; unset is `url`."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=7860, ge=0, le=65535)
    """Port to listen on."""
    root_path: str = ""
    """The sub-path that a proxy serves the page under, and takes away: `/playground`."""
    open: bool = False
    """Serve everybody who reaches a port that is not on loopback."""

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.open or self.host in ("127.0.0.1", "::1", "localhost"):
            return self
        raise ValueError(
            f"SAFELATENT_PLAYGROUND_HOST is {self.host}, and anyone who reaches it would ask with "
            "your API key: set SAFELATENT_PLAYGROUND_OPEN=1 where something else guards the port"
        )

    @field_validator("api_key", mode="after")
    @classmethod
    def _empty_is_none(cls, key: SecretStr | None) -> SecretStr | None:
        return key if key and key.get_secret_value() else None

    @property
    def shown_url(self) -> str:
        """The service's address in a request to copy."""
        return (self.public_url or self.url).rstrip("/")
