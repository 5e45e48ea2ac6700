"""Who calls: an API key names a tenant, and the tenant's policy comes with it."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

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

    def __init__(self, path: Path | None):
        """Raises UnusablePolicy for a file that cannot be used."""
        self.path = path
        self._policy: Policy | None = None
        self._stamp: tuple[int, int] | None = None
        if path is not None:
            self._policy, self._sha256 = policy.load(path)
            self._stamp = _stamp(path)

    def caller(self, authorization: str | None) -> Caller:
        """Who an Authorization header names; Unauthorized when nobody."""
        if self.path is None or self._policy is None:
            return Caller(OPEN, Tenant())
        self._follow(self.path)
        tenant = self._policy.tenant_of(authorization)
        return Caller(tenant, self._policy.tenants[tenant], self._policy.name, self._sha256)

    def _follow(self, path: Path) -> None:
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._policy, self._sha256 = policy.load(path)
            log.warning("the policy file has changed, and is in force: sha256 %s", self._sha256)
        except policy.UnusablePolicy as error:
            log.error("the policy file has changed, and the old one stays in force: %s", error)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


async def _caller(request: Request) -> Caller:
    callers: Callers = request.app.state.parts.callers
    caller = callers.caller(request.headers.get("authorization"))
    note(tenant=caller.tenant)
    return caller


TheCaller = Annotated[Caller, Depends(_caller)]
