"""An error as a person would say it: what happened, and what helps."""

from dataclasses import dataclass, field

from safelatent import errors
from safelatent.errors import SafelatentError

FIELDS = {
    "prompt": "Prompt",
    "model": "Model",
    "seed": "Seed",
    "steps": "Steps",
    "guidance_scale": "Guidance",
    "safety.level": "Level",
    "safety.concepts": "Concepts",
    "safety.checks": "Flagged pictures",
}
"""What the page calls a field of the request."""


@dataclass(frozen=True)
class Said:
    title: str
    text: str
    cure: str = ""
    items: list[str] = field(default_factory=list)


def said(error: SafelatentError, url: str, has_key: bool) -> Said:
    """The error in plain words. `url` is the service's; `has_key` says whether a key was sent."""
    text = error.problem.detail or error.problem.title
    if isinstance(error, errors.NoAnswer):
        return Said(
            "The service is away",
            f"Nothing answers at {url}.",
            "Is it running? `make run` starts it. Then try again: nothing you typed is lost.",
        )
    if isinstance(error, errors.Unauthorized):
        sent = "The service does not take the playground's API key."
        return Said(
            "An API key is needed",
            sent if has_key else "The service answers only to callers with a key.",
            f"Start the playground with SAFELATENT_API_KEY set to a valid key ({text}).",
        )
    if isinstance(error, errors.Forbidden):
        return Said("Your policy does not allow this", text, "Choose what the policy allows.")
    if error.problem.status == 429:
        return Said("Too many requests just now", text, _later(error))
    if isinstance(error, errors.InvalidRequest):
        items = [f"{_field(each.field)}: {each.message}" for each in error.problem.errors]
        return Said(
            "The request cannot be made as it is", "" if items else text, "What to change:", items
        )
    if isinstance(error, errors.QueueUnavailable | errors.NotReady | errors.StoreUnavailable):
        return Said(error.title, text, _later(error))
    if isinstance(error, errors.GenerationCancelled):
        return Said("Stopped", "The picture was not finished.", "Draw again when you like.")
    if isinstance(error, errors.JobError):
        return Said("The picture was not made", f"{error.problem.title}. {error.problem.detail}")
    return Said(error.problem.title, text)


def _later(error: SafelatentError) -> str:
    if error.retry_after_s is None:
        return "Try again in a moment."
    return f"Try again in {error.retry_after_s:g} s."


def _field(name: str) -> str:
    """The longest known beginning: `safety.concepts.0` is one of the concepts."""
    known = [each for each in FIELDS if name == each or name.startswith(each + ".")]
    return FIELDS[max(known, key=len)] if known else name
