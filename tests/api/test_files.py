"""Files: what is uploaded comes back, to the byte, to whom it belongs, and nothing of what was cut off stays."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from redis.asyncio import Redis

from api.files import MAX_FILES, PIECE_BYTES, UPLOAD_TTL_S, File, Files, new_file, pieces_at_once
from api.routes.files import UPLOAD_TIMEOUT_S
from api.wire.uploads import MAX_FIELD_BYTES, MAX_PARTS, MIN_EXPIRES_S, Upload
from shared.errors import APIError, BadRequest, FileTooLarge, NoSuchFile, StorageFull
from shared.settings import Settings
from tests.api.conftest import KEYS, client
from tests.api.scripted import WAIT_S, error_of
from tests.system import System, alive

ADDRESS = "/v1/files"
MAX_FILE_BYTES, MAX_TENANT_FILE_BYTES = 3 << 20, 4 << 20
BOUNDARY = "xyz"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def part(name: str, value: bytes, more: str = "") -> bytes:
    return b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
        BOUNDARY.encode(), name.encode(), more.encode(), value)


def form(content: bytes, **fields: str) -> bytes:
    return b"".join([*(part(name, value.encode()) for name, value in fields.items()),
                     part("file", content, '; filename="lines.jsonl"'), f"--{BOUNDARY}--\r\n".encode()])


# ── the form, by itself ──


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_form_is_read_wherever_it_is_cut(size: int) -> None:
    content = b"one\r\n--xy\r\n\r\n--xyz_\n" + bytes(range(256))
    body = part("file", content, '; filename="a.jsonl"') + part("purpose", b"batch") + part("x", b"") + b"--xyz--\r\n"
    upload, found = Upload(FORM["content-type"]), b""
    for begin in range(0, len(body), size):
        found += upload.feed(body[begin:begin + size])
    assert (found, upload.filename, upload.purpose, upload.is_whole) == (content, "a.jsonl", "batch", True)
    assert upload.lifetime_s(7.0) == 7.0


@pytest.mark.parametrize("body", [
    b"no form", part("purpose", b"x" * (MAX_FIELD_BYTES + 1)), part("file", b"a") * 2,
    part("x", b"") * (MAX_PARTS + 1), part("", b"a"), b"--xyz\r\nA: b\r\n\r\nc\r\n", b"--xyz\r\n" + b"A" * 10_000,
    part("purpose", b"fine-tune") + b"--xyz--\r\n", b"--xyz--\r\n",
    part("purpose", b"batch") + part("expires_after[anchor]", b"created_at")
    + part("expires_after[seconds]", b"9") + b"--xyz--\r\n"])
def test_what_is_no_form_of_an_upload_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        read(body)


def read(body: bytes) -> None:
    upload = Upload(FORM["content-type"])
    upload.feed(body)
    assert upload.purpose
    upload.lifetime_s(100_000)


@pytest.mark.parametrize("kind", ["", "application/json", "multipart/form-data",
                                  "multipart/form-data; boundary=" + "x" * 999])
def test_another_content_type_is_refused(kind: str) -> None:
    with pytest.raises(BadRequest):
        Upload(kind)


def test_small_pieces_are_read_many_at_a_time() -> None:
    assert pieces_at_once(File("f", num_pieces=3, num_bytes=3 * PIECE_BYTES)) == 1
    assert pieces_at_once(File("f", num_pieces=1000, num_bytes=1000 * 4096)) == PIECE_BYTES // 4096
    assert pieces_at_once(File("f", num_pieces=1000, num_bytes=1000)) == 256


# ── in each Redis ──


@pytest.fixture
def files(each_redis: Redis) -> Files:
    return Files(each_redis, Settings(max_file_bytes=100, max_tenant_file_bytes=150))


async def keep(files: Files, content: bytes, lifetime_s: float = 60.0) -> File:
    return await files.finish("t", await files.append("t", new_file(), content), lifetime_s)


async def content(files: Files, file: File) -> bytes:
    return b"".join([piece async for piece in files.read("t", file)])


def test_a_slow_upload_keeps_its_pieces_and_no_file_is_kept_longer_than_asked() -> None:
    assert UPLOAD_TIMEOUT_S <= UPLOAD_TTL_S <= MIN_EXPIRES_S


async def test_a_file_is_seen_once_it_is_whole(files: Files, each_redis: Redis) -> None:
    file = new_file()
    for piece in (b"one", b"two"):
        file = await files.append("t", file, piece)
        assert await files.list("t") == []
        assert 0 < await each_redis.pttl("{t.t}:pieces:" + file.id) / 1000 <= UPLOAD_TTL_S
    with pytest.raises(NoSuchFile):
        await files.get("t", file.id)
    file = await files.finish("t", file, 3600)
    assert await files.get("t", file.id) == file
    assert (await content(files, file), file.num_bytes) == (b"onetwo", 6)
    assert 3_500_000 < await each_redis.pttl("{t.t}:pieces:" + file.id) <= 3_600_000
    await files.finish("t", file, 60)
    assert await files.get("t", file.id) == file, "its life is never made shorter"
    with pytest.raises(NoSuchFile):
        await files.get("other", file.id)
    await files.remove("t", file.id)
    with pytest.raises(NoSuchFile):
        await content(files, file)
    assert await each_redis.exists("{t.t}:pieces:" + file.id) == 0


async def test_a_file_is_kept_longer_while_there_is_one(files: Files, each_redis: Redis) -> None:
    file = await keep(files, b"x", 60)
    await files.prolong("t", file.id, 2 * UPLOAD_TTL_S)
    longer = await files.get("t", file.id)
    assert replace(longer, expires_ms=0) == replace(file, expires_ms=0)
    assert longer.expires_ms > file.expires_ms
    for key in ("{t.t}:files", "{t.t}:pieces:" + file.id):
        assert UPLOAD_TTL_S < await each_redis.pttl(key) / 1000 <= 2 * UPLOAD_TTL_S
    await files.prolong("t", file.id, 60)
    assert await files.get("t", file.id) == longer, "its life is never made shorter"
    short = await files._write("t", new_file(), 0.05, piece=(0, b"x"))
    await asyncio.sleep(0.1)
    await files.remove("t", file.id)
    for gone in (file, short):
        with pytest.raises(NoSuchFile):
            await files.prolong("t", gone.id, 3600)
    assert await files.list("t") == []


async def test_a_write_that_is_repeated_writes_once(files: Files) -> None:
    """As redis-py does when a reply was lost."""
    file = new_file()
    twice = [await files.append("t", file, b"once") for _ in range(2)]
    assert (await content(files, twice[1]), twice[1].num_bytes) == (b"once", 4)


async def test_a_tenant_has_so_much_room(files: Files) -> None:
    with pytest.raises(FileTooLarge):
        await files.append("t", new_file(), b"x" * 101)
    first = await keep(files, b"x" * 100)
    half = await files.append("t", new_file(), b"x" * 50)
    with pytest.raises(StorageFull):
        await files.append("t", new_file(), b"x")
    await keep(Files(files._redis, files._settings), b"", 60)
    await files.remove("t", half.id)
    await files.remove("t", first.id)
    await keep(files, b"x" * 100)


async def test_what_has_expired_takes_no_room(files: Files) -> None:
    await keep(files, b"x" * 100)
    short = new_file()
    await files._write("t", short, 0.05, piece=(0, b"x" * 50))
    await asyncio.sleep(0.1)
    await files.append("t", new_file(), b"x" * 50)
    assert await files._redis.hexists("{t.t}:files", short.id) == 0


async def test_a_tenant_has_so_many_files(each_redis: Redis) -> None:
    files = Files(each_redis, Settings())
    rest = await keep(files, b"x")
    raw: Any = await each_redis.hget("{t.t}:files", rest.id)
    await each_redis.hset("{t.t}:files", mapping={f"file-{number}": raw for number in range(MAX_FILES - 1)})
    with pytest.raises(StorageFull, match=str(MAX_FILES)):
        await keep(files, b"x")


# ── over HTTP ──


@pytest.fixture(scope="module")
def own(redis_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    system = System(tmp_path_factory.mktemp("files"), redis_url, allow_no_aof=True, api_key=",".join(KEYS),
                    max_file_bytes=MAX_FILE_BYTES, max_tenant_file_bytes=MAX_TENANT_FILE_BYTES)
    system.start_pod()
    yield system
    system.stop()


@pytest.fixture
async def http(own: System) -> AsyncIterator[httpx.AsyncClient]:
    """Of a tenant without files."""
    async with client(own.url) as http:
        for file in (await http.get(ADDRESS)).json()["data"]:
            await http.delete(f"{ADDRESS}/{file['id']}")
        yield http


async def upload(http: httpx.AsyncClient, content: bytes, **fields: str) -> dict[str, Any]:
    response = await http.post(ADDRESS, content=form(content, **{"purpose": "batch"} | fields), headers=FORM)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_what_is_uploaded_comes_back(own: System, http: httpx.AsyncClient) -> None:
    content = random.Random(1).randbytes(2 * PIECE_BYTES + 17)
    file = await upload(http, content)
    assert file | {"id": "", "created_at": 0, "expires_at": 0} == {
        "id": "", "object": "file", "bytes": len(content), "created_at": 0, "expires_at": 0, "filename": "lines.jsonl",
        "purpose": "batch", "status": "processed", "status_details": None}
    assert (await http.get(f"{ADDRESS}/{file['id']}")).json() == file
    found = await http.get(f"{ADDRESS}/{file['id']}/content")
    assert (found.content, found.headers["content-length"]) == (content, str(len(content)))
    async with client(own.url, KEYS[1]) as stranger:
        assert (await stranger.get(ADDRESS)).json()["data"] == []
        one = f"{ADDRESS}/{file['id']}"
        for response in (await stranger.get(one), await stranger.delete(one), await stranger.get(f"{one}/content")):
            assert error_of(response, 404)["code"] == "file_not_found"
    assert (await http.delete(one)).json() == {"id": file["id"], "object": "file", "deleted": True}
    error_of(await http.get(f"{one}/content"), 404)


async def test_a_file_without_its_content_is_not_found(own: System, http: httpx.AsyncClient) -> None:
    """It is told before anything else is; of an empty file there is nothing to find."""
    file, empty = await upload(http, b"x"), await upload(http, b"")
    own.redis.delete(*(key for key in own.redis.scan_iter("{t.*}:pieces:*")))
    assert error_of(await http.get(f"{ADDRESS}/{file['id']}/content"), 404)["code"] == "file_not_found"
    assert (await http.get(f"{ADDRESS}/{empty['id']}/content")).content == b""


async def test_a_list_has_pages(http: httpx.AsyncClient) -> None:
    ids = [(await upload(http, b"x", purpose=purpose))["id"] for purpose in ("batch", "user_data", "batch")]
    assert [file["id"] for file in (await http.get(ADDRESS)).json()["data"]] == ids[::-1]
    page = (await http.get(ADDRESS, params={"order": "asc", "limit": "1", "after": ids[0]})).json()
    assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids[1:2], True)
    page = (await http.get(ADDRESS, params={"purpose": "batch", "order": "asc"})).json()
    assert [file["id"] for file in page["data"]] == [ids[0], ids[2]]


@pytest.mark.parametrize(("order", "purpose"), [("asc", "batch"), ("desc", "batch"), ("asc", None), ("desc", None)])
async def test_who_lists_and_deletes_in_turn_deletes_all(order: str, purpose: str | None, http: httpx.AsyncClient
                                                         ) -> None:
    ids = [(await upload(http, b"x"))["id"] for _ in range(5)]
    params, seen = {"order": order, "limit": "2"} | ({"purpose": purpose} if purpose else {}), list[str]()
    while True:
        page = (await http.get(ADDRESS, params=params | ({"after": seen[-1]} if seen else {}))).json()
        for file in page["data"]:
            await http.delete(f"{ADDRESS}/{file['id']}")
            seen.append(file["id"])
        if not page["has_more"]:
            break
    assert seen == (ids if order == "asc" else ids[::-1])
    for after in ("nope", f"chatcmpl-{ids[0]}"):
        assert error_of(await http.get(ADDRESS, params={"after": after}), 400)["param"] == "after"


@pytest.mark.parametrize(("fields", "param"), [
    ({"purpose": "assistants"}, "purpose"), ({"expires_after[anchor]": "created_at"}, "expires_after"),
    ({"expires_after[anchor]": "now", "expires_after[seconds]": "4000"}, "expires_after")])
async def test_a_wrong_field_is_named(http: httpx.AsyncClient, fields: dict[str, str], param: str) -> None:
    body = form(b"x", **{"purpose": "batch"} | fields)
    assert error_of(await http.post(ADDRESS, content=body, headers=FORM), 400)["param"] == param


async def test_a_file_expires_when_it_is_told_to(http: httpx.AsyncClient) -> None:
    file = await upload(http, b"x", **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "4000"})
    assert abs(file["expires_at"] - file["created_at"] - 4000) <= 1


async def test_too_much_is_refused_and_leaves_nothing(own: System, http: httpx.AsyncClient) -> None:
    before = keys(own)
    error = error_of(await http.post(ADDRESS, content=form(b"x" * (MAX_FILE_BYTES + 1), purpose="batch"), headers=FORM),
                     413)
    assert error["code"] == "file_too_large"
    error_of(await http.post(ADDRESS, content=form(b"x" * 999_999), headers=FORM), 400)
    assert keys(own) == before
    await upload(http, b"x" * (MAX_FILE_BYTES - 1))
    error = error_of(await http.post(ADDRESS, content=form(b"x" * (2 << 20), purpose="batch"), headers=FORM), 400)
    assert error["code"] == "storage_limit_exceeded"
    assert len((await http.get(ADDRESS)).json()["data"]) == 1
    assert len(keys(own) - before) == 2


async def test_an_upload_that_is_cut_off_leaves_nothing(own: System, http: httpx.AsyncClient) -> None:
    before = keys(own)

    async def half() -> AsyncIterator[bytes]:
        yield form(b"x" * (2 * PIECE_BYTES), purpose="batch")[:-100]
        async with asyncio.timeout(WAIT_S):
            while keys(own) == before:
                await asyncio.sleep(0.01)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await http.post(ADDRESS, content=half(), headers=FORM)
    async with asyncio.timeout(WAIT_S):
        while keys(own) != before:
            await asyncio.sleep(0.01)
    alive(own.pods[own.url])


def keys(system: System) -> set[bytes]:
    return set(system.redis.scan_iter("{t.*}:pieces:*")) | set(system.redis.scan_iter("{t.*}:files"))


async def test_the_official_client(own: System, http: httpx.AsyncClient) -> None:
    async with openai.AsyncOpenAI(base_url=f"{own.url}/v1", api_key=KEYS[0], max_retries=0, timeout=WAIT_S) as sdk:
        content = b'{"a": 1}\n' * 100_000
        file = await sdk.files.create(file=("x.jsonl", content), purpose="batch",
                                      expires_after={"anchor": "created_at", "seconds": 3600})
        assert (file.bytes, file.filename, file.purpose) == (len(content), "x.jsonl", "batch")
        assert (await sdk.files.content(file.id)).content == content
        assert [each.id async for each in sdk.files.list(limit=1)] == [file.id]
        assert (await sdk.files.retrieve(file.id)).expires_at == file.expires_at
        assert (await sdk.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await sdk.files.retrieve(file.id)


@pytest.mark.parametrize("error", [StorageFull, FileTooLarge, NoSuchFile])
def test_refusals_are_no_fault_of_the_service(error: type[APIError]) -> None:
    assert 400 <= error.status < 500
