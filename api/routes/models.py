"""`GET /v1/models` and `GET /v1/models/{id}`: the names that workers announce; embeddings are refused."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api import docs
from api.pod import Pod
from shared.card import Card
from shared.errors import ModelNotFound, NoEmbeddings


def router(pod: Pod) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/models", openapi_extra=docs.says(gives="Models"))
    async def list_models() -> dict[str, Any]:
        """Every model that is served at the moment."""
        return {"object": "list", "data": [_model(name, card) for name, card in pod.directory.names().items()]}

    @routes.get("/v1/models/{model:path}", openapi_extra=docs.says(gives="Model"))
    async def retrieve_model(model: str) -> dict[str, Any]:
        """One model. Its name may hold slashes."""
        card = pod.directory.names().get(model)
        if card is None:
            raise ModelNotFound(param="model")
        return _model(model, card)

    @routes.post("/v1/embeddings")
    async def create_embeddings() -> None:
        """Refused: no worker serves embeddings."""
        raise NoEmbeddings

    return routes


def _model(name: str, card: Card) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": card.created_s, "owned_by": "baton",
            "root": card.model, "max_model_len": card.max_model_len}
