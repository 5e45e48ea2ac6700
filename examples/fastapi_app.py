"""A web application of your own that draws with safelatent: `uvicorn examples.fastapi_app:app`.

One AsyncClient serves all requests; its address and key come from SAFELATENT_URL and
SAFELATENT_API_KEY. What the service refuses is told to the caller with its own status.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException, Request, Response

from safelatent import AsyncClient, errors


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with AsyncClient() as app.state.safelatent:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/pictures/{prompt}")
async def picture(request: Request, prompt: str, seed: int | None = None) -> Response:
    client: AsyncClient = request.app.state.safelatent
    fields = {} if seed is None else {"seed": seed}
    try:
        generation = await client.generate(prompt, safety="strong", timeout=60, **fields)
        content = await generation.images[0].bytes()
    except errors.ImageBlocked as error:
        raise HTTPException(451, str(error)) from error
    except errors.SafelatentError as error:
        raise HTTPException(error.problem.status, str(error)) from error
    return Response(content, media_type=generation.images[0].media_type)
