"""What the guidance did to an image: numbers a call, from tensors to the safety report.

None of them is a calibrated risk. They say how the prompt's direction lay to the concept's, and how
much of the guidance was taken back; see docs/architecture.md for how to read them.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safelatent.schema import TelemetrySteps, TelemetrySummary
from worker import guidance

OBSERVED = ("cosine", "undone", "active", "momentum", "strength")


def observe(
    e_0: Tensor,
    e_p: Tensor,
    e_S: Tensor,
    difference: Tensor,
    lam: Tensor,
    mu: Tensor,
    gamma: Tensor,
    inertia: Tensor,
) -> Tensor:
    """One column an image: cosine, undone, active, momentum, strength; [5, m], no synchronisation.

    With g = e_p - e_0: cos(g, e_S - e_0); <gamma, g> / |g|^2; share of elements with mu > 0 less
    Phi(lambda / sd(difference)), the share that symmetric noise of that spread would give;
    |s_m nu| / |gamma|, where `inertia` is s_m nu; and |gamma| / |g|.
    """
    g = (e_p - e_0).flatten(1)
    taken, carried = gamma.flatten(1), inertia.flatten(1)
    tiny = torch.finfo(g.dtype).tiny
    length, strength = g.norm(dim=1).clamp_min(tiny), taken.norm(dim=1)
    noise = 0.5 * (
        1 + torch.erf(lam.flatten() / (difference.flatten(1).std(dim=1) * math.sqrt(2) + tiny))
    )
    return torch.stack(
        [
            guidance.cosine(g, (e_S - e_0)),
            (taken * g).sum(dim=1) / length.square(),
            (mu > 0).flatten(1).float().mean(dim=1) - noise,
            carried.norm(dim=1) / strength.clamp_min(tiny),
            strength / length,
        ]
    )


@dataclass
class Record:
    """The telemetry of one image, as it grows. Tensors stay on their device until it is read."""

    calls: int
    warmup: int
    seen: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    """(denoiser call, its column of `observe` [5], index of the concept that acted [])."""
    heat: Tensor | None = None
    """Sum over the applied calls of the channel mean of |gamma|, [h, w]."""

    def read(self) -> "Telemetry":
        """Fetch everything from the device at once."""
        if not self.seen:
            return Telemetry(self.calls, self.warmup, [], [], [], None)
        numbers = torch.stack([column for _, column, _ in self.seen]).double()
        concepts = torch.stack([concept for _, _, concept in self.seen]).tolist()
        heat = None if self.heat is None else self.heat.float().cpu()
        return Telemetry(
            self.calls,
            self.warmup,
            [call for call, _, _ in self.seen],
            numbers.tolist(),
            concepts,
            heat,
        )


@dataclass(frozen=True)
class Telemetry:
    """The telemetry of one finished image."""

    calls: int
    warmup: int
    seen: list[int]
    numbers: list[list[float]]
    concepts: list[int]
    heat: Tensor | None

    @property
    def applied(self) -> list[int]:
        """Places in `seen` of the calls in which the guidance was changed."""
        strength = OBSERVED.index("strength")
        return [
            place
            for place, call in enumerate(self.seen)
            if call >= self.warmup and self.numbers[place][strength] > 0
        ]

    def steps(self) -> TelemetrySteps:
        columns = list(zip(*self.numbers, strict=True)) or [()] * len(OBSERVED)
        cosine, undone, active, momentum = [
            [round(number, 5) for number in column] for column in columns[:4]
        ]
        return TelemetrySteps(
            call=self.seen,
            concept=self.concepts,
            cosine=cosine,
            undone=undone,
            active=active,
            momentum=momentum,
        )

    def summary(self) -> TelemetrySummary | None:
        applied = [self.numbers[place] for place in self.applied]
        if not applied:
            return None
        cosine, undone, active, momentum, _ = [
            round(sum(column) / len(applied), 5) for column in zip(*applied, strict=True)
        ]
        peak = max(self.applied, key=lambda place: self.numbers[place][1])
        return TelemetrySummary(
            applied_calls=len(applied),
            calls=self.calls,
            cosine=cosine,
            undone=undone,
            active=active,
            momentum=momentum,
            peak_call=self.seen[peak],
        )
