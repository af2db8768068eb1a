"""`/v1/files`: uploaded, listed, described, read and deleted, piece by piece: no pod ever holds a whole one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from starlette.responses import StreamingResponse

from api import docs
from api.auth import Door
from api.files import PIECE_BYTES, File, new_file
from api.pod import Pod
from api.routes.listing import After, Sorting, is_newest_first, page_of, page_size
from api.wire.uploads import Upload
from shared import connection
from shared.errors import BadRequest, Draining, FileTooLarge, MissingField, TooSlow

ADDRESS = "/v1/files"
MAX_LISTED = 10_000
FileLimit = Annotated[str | None, Query(description=f"1 to {MAX_LISTED}; else {MAX_LISTED}")]
DRAINED_BYTES = 1 << 20                                 # of a body that is too large, and of a form beside its file
SILENCE_S = 60.0                                        # within an upload
UPLOAD_TIMEOUT_S = 3600.0                               # not above UPLOAD_TTL_S: a piece may come as late as that


def router(pod: Pod, door: Door) -> APIRouter:
    routes = APIRouter()

    @routes.post(ADDRESS, openapi_extra=docs.UPLOAD | docs.says(gives="FileObject"))
    async def create_file(request: Request, tenant: str = Depends(door)) -> dict[str, Any]:
        """Takes a file, for a batch or for its own sake."""
        if pod.draining:
            raise Draining(retry_after_s=0.1)
        pod.limits.check_memory()
        file = new_file()
        try:
            return (await _take(pod, tenant, file, request)).body()
        except BaseException:
            with suppress(*connection.TROUBLE):         # its pieces expire anyway
                await pod.files.remove(tenant, file.id)
            raise

    @routes.get(ADDRESS, openapi_extra=docs.says(gives="Page"))
    async def list_files(purpose: str | None = None, after: After = None, limit: FileLimit = None,
                         order: Sorting = None, tenant: str = Depends(door)) -> dict[str, Any]:
        """The files of the key."""
        bodies = [file.body() for file in await pod.files.list(tenant, after)
                  if purpose in (None, file.purpose) or not file.is_whole]
        return page_of(bodies, after, page_size(limit, default=MAX_LISTED, most=MAX_LISTED),
                       newest_first=is_newest_first(order, default="desc"))

    @routes.get(ADDRESS + "/{file_id}", openapi_extra=docs.says(gives="FileObject"))
    async def retrieve_file(file_id: str, tenant: str = Depends(door)) -> dict[str, Any]:
        """The facts of a file."""
        return (await pod.files.get(tenant, file_id)).body()

    @routes.get(ADDRESS + "/{file_id}/content", response_class=StreamingResponse)
    async def download_file(file_id: str, tenant: str = Depends(door)) -> Response:
        """The bytes of a file."""
        file = await pod.files.get(tenant, file_id)
        pieces = pod.files.read(tenant, file)
        first = await anext(pieces, b"")                # before the headers: what has no content is not found
        return StreamingResponse(_chained(first, pieces), media_type="application/octet-stream",
                                 headers={"content-length": str(file.num_bytes)})

    @routes.delete(ADDRESS + "/{file_id}", openapi_extra=docs.says(gives="Deleted"))
    async def delete_file(file_id: str, tenant: str = Depends(door)) -> dict[str, Any]:
        """Deletes a file. A batch that still reads it fails."""
        await pod.files.get(tenant, file_id)
        await pod.files.remove(tenant, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return routes


async def _chained(first: bytes, pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for piece in pieces:
        yield piece


async def _take(pod: Pod, tenant: str, file: File, request: Request) -> File:
    """The whole upload. Raises BadRequest, FileTooLarge, StorageFull or TooSlow."""
    upload, piece = Upload(request.headers.get("content-type", "")), bytearray()
    async for data in _body(request, pod.settings.max_file_bytes):
        piece += upload.feed(data)
        while len(piece) >= PIECE_BYTES:
            file = await pod.files.append(tenant, file, bytes(piece[:PIECE_BYTES]))
            del piece[:PIECE_BYTES]
    if not upload.is_whole:
        raise BadRequest("The form does not come to an end.")
    if upload.filename is None:
        raise MissingField("file: a form of an upload has this part.", param="file")
    purpose, lifetime_s = upload.purpose, upload.lifetime_s(pod.settings.file_s)
    if piece:
        file = await pod.files.append(tenant, file, bytes(piece))
    return await pod.files.finish(tenant, file.named(upload.filename, purpose), lifetime_s)


async def _body(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """Yields pieces as they arrive. Raises TooSlow or FileTooLarge."""
    num_bytes, stream, clock = 0, request.stream(), asyncio.get_running_loop().time
    end_s = clock() + UPLOAD_TIMEOUT_S
    while True:
        try:
            async with asyncio.timeout_at(min(clock() + SILENCE_S, end_s)):
                data = await anext(stream, None)
        except TimeoutError:
            raise TooSlow from None
        if data is None:
            return
        num_bytes += len(data)
        if num_bytes > max_bytes + DRAINED_BYTES:
            raise FileTooLarge(f"A file has at most {max_bytes} bytes.")
        yield data
