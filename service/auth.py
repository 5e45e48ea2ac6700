"""Who calls: an API key names a tenant, and the tenant's policy comes with it."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from safelatent.jobs import OPEN
from safelatent.schema import GenerationRequest, PolicyApplied
from service import policy
from service.observing import note
from service.policy import Policy, Tenant

log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Caller:
    """A tenant, and the policy that it calls under (None without a policy file)."""

    tenant: str
    rights: Tenant
    policy: str | None = None
    sha256: str | None = None

    def tighten(self, request: GenerationRequest) -> tuple[GenerationRequest, PolicyApplied | None]:
        """The request as this caller may have it; Forbidden where the policy refuses it."""
        if self.policy is None or self.sha256 is None:
            return request, None
        return policy.tighten(request, self.rights, self.policy, self.sha256)


class Callers:
    """The policy file, read again when it changes; a change that is no policy keeps the old one."""

    def __init__(self, path: Path | None, open_tenant: Tenant | None = None):
        """Raises UnusablePolicy for a file that cannot be used."""
        self.path = path
        self.open_tenant = open_tenant or Tenant()
        self._policy: Policy | None = None
        self._stamp: tuple[int, int] | None = None
        if path is not None:
            self._policy, self._sha256 = policy.load(path)
            self._stamp = _stamp(path)

    def caller(self, authorization: str | None) -> Caller:
        """Who an Authorization header names; Unauthorized when nobody."""
        if self.path is None or self._policy is None:
            return Caller(OPEN, self.open_tenant)
        self._follow(self.path)
        tenant = self._policy.tenant_of(authorization)
        return Caller(tenant, self._policy.tenants[tenant], self._policy.name, self._sha256)

    def webhook_secrets(self, tenant: str) -> list[str]:
        """What a tenant's webhooks are signed with; the first is the newest."""
        rights: Tenant | None = self.open_tenant
        if self.path is not None and self._policy is not None:
            self._follow(self.path)
            rights = self._policy.tenants.get(tenant)
        return [each.get_secret_value() for each in rights.webhook_secrets] if rights else []

    def _follow(self, path: Path) -> None:
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        self.reload()

    def reload(self) -> None:
        """Read the policy file again, if there is one."""
        if self.path is None:
            return
        try:
            self._policy, self._sha256 = policy.load(self.path)
            log.warning("the policy file was read again, and is in force: sha256 %s", self._sha256)
        except policy.UnusablePolicy as error:
            log.error("the policy file was read again, and the old one stays in force: %s", error)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


bearer = HTTPBearer(
    auto_error=False,
    description="An API key (`safelatent key new`); a service without a policy file needs none.",
)


async def _caller(request: Request, key: Annotated[Any, Security(bearer)]) -> Caller:
    callers: Callers = request.app.state.parts.callers
    caller = callers.caller(request.headers.get("authorization"))
    note(tenant=caller.tenant)
    return caller


TheCaller = Annotated[Caller, Depends(_caller)]
