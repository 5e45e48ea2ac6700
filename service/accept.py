"""Content negotiation: which of the media types on offer an Accept header likes best (RFC 9110)."""

import re
from collections.abc import Sequence

JSON = "application/json"
EVENT_STREAM = "text/event-stream"
IMAGES = {"image/png": "png", "image/webp": "webp", "image/jpeg": "jpeg"}
"""Media types by image format."""

RANGE = re.compile(r"([^\s/;,]+)/([^\s/;,]+)")
QUALITY = re.compile(r"q\s*=\s*([01](?:\.[0-9]{0,3})?)", re.IGNORECASE)


def preferred(accept: list[str], offered: Sequence[str]) -> str | None:
    """The media type that the Accept headers like best, the first of equals; None for none.

    What cannot be read is ignored; where nothing can be read everything is welcome.
    """
    ranges: dict[str, float] = {}
    for part in ",".join(accept).split(","):
        media_type, *parameters = (each.strip() for each in part.split(";"))
        if RANGE.fullmatch(media_type):
            found = [q[1] for each in parameters if (q := QUALITY.fullmatch(each))]
            ranges[media_type.lower()] = float(found[0]) if found else 1.0
    if not ranges:
        return offered[0]

    def quality(media_type: str) -> float:
        kind = media_type.split("/")[0]
        matching = (r for r in (media_type, f"{kind}/*", "*/*") if r in ranges)
        return ranges.get(next(matching, ""), 0)

    best = max(offered, key=quality)
    return best if quality(best) > 0 else None
