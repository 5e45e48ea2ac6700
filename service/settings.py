"""The frontend's settings, from the environment, read once."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from safelatent import logs
from safelatent.connecting import readable
from safelatent.defaults import DEFAULT_MODEL, DEFAULT_STORE_URL, model_id
from service.cors import ORIGIN
from service.policy import Tenant, webhook_secret
from service.webhooks.addresses import Allowed


class Settings(BaseSettings):
    """Environment variables are SAFELATENT_<NAME>, but for REDIS_URL.

    Without a policy file whoever reaches the port may use the service. So it then listens on
    loopback only, unless SAFELATENT_OPEN says that this is meant.
    """

    model_config = SettingsConfigDict(
        env_prefix="SAFELATENT_", frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    redis_url: Annotated[str, AfterValidator(readable)] = Field(validation_alias="REDIS_URL")
    """Address of Redis or Valkey: redis://, rediss:// or unix://, or its sentinels' as
    redis+sentinel://host:26379,host:26379/master/0."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 takes a free one."""
    model: str = DEFAULT_MODEL
    """Folder or hub id of the default model; only its name matters here."""
    store_url: str = DEFAULT_STORE_URL
    """Where images live: file://, s3://, gs://, az:// or memory://; the same for workers."""
    policy_file: Path | None = None
    """TOML with tenants, their keys and what they may ask for (service/policy.py)."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins whose web pages may call the service, commas between; `*` is every page."""
    max_requests: int = Field(default=4096, ge=1)
    """Requests that one process serves at once, streams of events included."""
    max_queued: int = Field(default=1000, ge=1)
    """Generations that may wait for a model at once, of all tenants together."""
    open: bool = False
    """Serve everybody who reaches a port that is not on loopback."""
    webhook_secret: SecretStr | None = None
    """`whsec_...` that signs webhooks where there is no policy file, which else names them."""
    webhook_allow: str = ""
    """Host names and networks, with commas between, that webhooks may reach although they are
    private, and by http: `localhost, 10.0.0.0/8`."""

    @field_validator("webhook_secret")
    @classmethod
    def _is_secret(cls, secret: SecretStr | None) -> SecretStr | None:
        text = secret.get_secret_value() if secret else ""
        return webhook_secret(text) if text else None  # Compose passes on what is not set as ""

    @field_validator("webhook_allow")
    @classmethod
    def _can_be_read(cls, text: str) -> str:
        Allowed.parse(text)
        return text

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _split(cls, origins: Any) -> Any:
        if not isinstance(origins, str):
            return origins
        found = tuple(origin.strip() for origin in origins.split(",") if origin.strip())
        for origin in found:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin, as https://app.example.com is one")
        return found

    metrics_host: str = "127.0.0.1"
    """Address of the metrics port."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """Where /metrics is served for Prometheus alone; 0 is nowhere."""
    log_level: logs.Level = "INFO"
    """Least level of the log's lines."""
    log_format: logs.Format | None = None
    """json or console; unset is console on a terminal and json elsewhere."""

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
    def open_tenant(self) -> Tenant:
        """Everybody's rights where there is no policy file."""
        return Tenant(webhook_secrets=[self.webhook_secret] if self.webhook_secret else [])

    @property
    def model_id(self) -> str:
        """The default model's id."""
        return model_id(self.model)
