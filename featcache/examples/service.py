"""A web service that labels images: at most so many, of so many bytes, at once; one that is damaged is refused with the reason.

pip install fastapi uvicorn
FEATCACHE_MODEL=model uvicorn --factory service:make_app --limit-concurrency 8
echo "{\"images\": [\"$(base64 -w0 a.jpg)\", \"$(base64 -w0 b.jpg)\"]}" | curl localhost:8000/predict -d @-

Behind a proxy that knows who may ask, and under something that starts it again.
"""

import os
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from pydantic import Base64Bytes, BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool

import featcache

MOST_IMAGES = 64
MOST_BYTES = 32 * 2**20  # of a request; a third of base64 is packing


class Batch(BaseModel):
    """What is asked."""

    images: Annotated[list[Base64Bytes], Field(min_length=1, max_length=MOST_IMAGES)]


def make_app() -> FastAPI:
    """The service. Its model, of the folder that FEATCACHE_MODEL names, is loaded once, before the first request."""
    model, one_at_a_time = featcache.load_model(os.environ.get("FEATCACHE_MODEL", "model")), threading.Lock()
    model.predict([np.zeros((8, 8, 3), np.uint8)])  # loads the backbone, and checks its weights
    app = FastAPI(title="featcache")

    def label(images: list[bytes]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder, one_at_a_time:
            paths = [Path(folder) / f"{number:03d}.jpg" for number in range(len(images))]  # what it is, its bytes say
            for path, image in zip(paths, images, strict=True):
                path.write_bytes(image)
            rows = model.predict(paths)
        shown = ("label", "probability", "status", "reason")
        return [{name: _text(getattr(row, name)) for name in shown} for row in rows]

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        body = bytearray()
        async for piece in request.stream():  # counted as it comes: what a request says of its length need not be true
            body += piece
            if len(body) > MOST_BYTES:
                raise HTTPException(413, f"a request may have {MOST_BYTES} bytes")
        try:
            batch = Batch.model_validate_json(bytes(body))
        except ValidationError as error:
            raise HTTPException(422, [entry["msg"] for entry in error.errors()[:3]]) from None
        return {"rows": await run_in_threadpool(label, batch.images)}

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"classes": [*map(_text, model.classes)], "fingerprint": model.fingerprint}

    return app


def _text(value: Any) -> Any:
    """As JSON takes it: names of classes may be no Unicode."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
