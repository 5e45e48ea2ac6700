"""A page for each type of problem: what it means, from the class, and what to do about it."""

import inspect
from collections.abc import Iterator

from safelatent.errors import ERRORS, PROBLEM_TYPE, SafelatentError
from service.advice import ADVICE

BRANCHES = {
    "request-error": "The request cannot be served as it is: the same one would fail again.",
    "service-error": "The service has trouble: the same request may succeed later.",
    "job-error": "The request was accepted, and its generation did not succeed.",
}


def branch(cls: type[SafelatentError]) -> str | None:
    """The slug of the branch of the tree that a class is in; None for the root."""
    slugs = (parent.slug() for parent in cls.__mro__ if issubclass(parent, SafelatentError))
    return next((slug for slug in slugs if slug in BRANCHES), None)


def pages() -> Iterator[tuple[str, str]]:
    """(Slug, Markdown) of every class of the tree."""
    for slug, cls in ERRORS.items():
        lines = [
            f"# `{slug}`",
            "",
            f"**{cls.title}.** {' '.join((inspect.getdoc(cls) or '').split())}",
            "",
            f"- type: `{PROBLEM_TYPE}{slug}`",
            f"- status: {cls.status}",
            f"- class: `safelatent.errors.{cls.__name__}`",
        ]
        if within := branch(cls):
            lines += ["", BRANCHES[within]]
        if slug in ADVICE:
            cause, cure = ADVICE[slug]
            lines += ["", "## Usual cause", "", cause, "", "## What to do", "", cure]
        lines += ["", "[All problems](../troubleshooting.md)"]
        yield slug, "\n".join(lines) + "\n"


def index() -> str:
    """The page that lists them all, as the tree is drawn."""
    drawn = (inspect.getdoc(inspect.getmodule(SafelatentError)) or "").split("\n\n")[1]
    slugs = "\n".join(f"../problems/{slug}" for slug in ERRORS)
    return (
        "# Problems\n\nEvery error of the service, the client and a generation is of this tree.\n"
        "The last part of a problem's `type` is the class's name in small letters with hyphens.\n"
        f"What to do about each: [](../troubleshooting.md).\n\n```text\n{drawn}\n```\n\n"
        f"```{{toctree}}\n:hidden:\n\n{slugs}\n```\n"
    )
