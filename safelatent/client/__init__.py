"""The client: a prompt in, images and a safety report out.

    from safelatent import Client

    with Client() as client:
        generation = client.generate("a cat on the moon", seed=7, safety="strong")
        generation.images[0].save("cat.png")

`AsyncClient` has the same verbs, to be awaited. Errors are those of `safelatent.errors`.
"""

from safelatent.client.asynchronous import AsyncClient, AsyncGeneration, AsyncImage
from safelatent.client.events import (
    Event,
    Finished,
    ImageStored,
    Queued,
    Snapshot,
    Started,
    Step,
)
from safelatent.client.fields import RequestFields, SafetyFields
from safelatent.client.synchronous import Client, Generation, Image

__all__ = [
    "AsyncClient",
    "AsyncGeneration",
    "AsyncImage",
    "Client",
    "Event",
    "Finished",
    "Generation",
    "Image",
    "ImageStored",
    "Queued",
    "RequestFields",
    "SafetyFields",
    "Snapshot",
    "Started",
    "Step",
]
