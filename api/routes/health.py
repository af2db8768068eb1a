"""For machines that watch: `/health` (the process lives), `/ready` (it can accept jobs), `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from api.pod import Pod
from shared.errors import Unavailable


def router(pod: Pod) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    @routes.head("/health", include_in_schema=False)
    async def health() -> dict[str, str]:
        """200 as long as the process lives, whatever Redis does."""
        return {"status": "ok"}

    @routes.get("/ready")
    @routes.head("/ready", include_in_schema=False)
    async def ready() -> dict[str, object]:
        """200 when this pod can accept jobs: Redis has answered lately, and the pod is not draining."""
        if not pod.ready:
            raise Unavailable(retry_after_s=1.0)
        return {"status": "ready", "models": list(pod.directory.names())}

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format: this pod, and the shards as Redis shows them."""
        text = await pod.metrics.scrape(pod.directory.queues(), pod.relay.num_streams)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    return routes
