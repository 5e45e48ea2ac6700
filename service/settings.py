"""The frontend's settings, from the environment, read once."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from safelatent.defaults import DEFAULT_MODEL, DEFAULT_STORE_URL, model_id


class Settings(BaseSettings):
    """Environment variables are SAFELATENT_<NAME>, but for REDIS_URL.

    There is no authentication yet: whoever reaches the port may use the service. So it listens on
    loopback, unless SAFELATENT_HOST says otherwise.
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

    @property
    def model_id(self) -> str:
        """The default model's id."""
        return model_id(self.model)
