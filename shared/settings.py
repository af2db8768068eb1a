"""Every setting, with its default, its unit and its reason. Read once, whole; a wrong one stops the start.

A setting is a field here, a variable `BATON_<NAME>` and, where `baton --help` lists it, a flag `--<name>`. Flags beat
variables, variables beat defaults. Flags are spelled as vLLM spells them where they mean the same.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from shared.errors import BrokenEnvironment

API_ONLY = frozenset({
    "host", "port", "api_key", "cors_origins", "max_body_bytes", "max_messages", "tool_dialect", "heartbeat_s",
    "max_pending_entries", "sweep_s", "disconnect_grace_s", "max_queued", "max_tenant_choices",
    "max_redis_fraction", "request_deadline_s", "store_s", "max_tenant_stored_bytes", "max_file_bytes",
    "max_tenant_file_bytes", "file_s", "batch_s"})
WORKER_ONLY = frozenset({
    "model", "revision", "served_model_name", "shard", "max_model_len", "max_num_seqs", "kv_cache_bytes",
    "prefill_chunk_tokens", "enable_prefix_caching", "exact_replay_max_tokens", "flush_s", "device", "dtype",
    "quantization", "threads", "step_timeout_s", "idle_poll_s", "patience_s", "prefix_patience_s",
    "allow_other_weights", "max_scan"})
SERVE_ONLY = frozenset({"apis", "workers", "data_dir"})

PREFIX = "BATON_"
TEST_PREFIX = "BATON_TEST_"                             # read only by tests/

MAX_S = 315_576_000.0                                   # ten years, of any duration
Seconds = Annotated[float, Field(le=MAX_S, allow_inf_nan=False)]
Words = Annotated[tuple[str, ...], NoDecode]            # separated by commas


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", hide_input_in_errors=True)

    # ── everybody ──
    redis_url: str = Field("redis://127.0.0.1:6379/0", description="where Redis is")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what is logged")
    drain_s: Seconds = Field(30.0, ge=0, description="how long running streams may go on after SIGTERM")

    # ── the API ──
    host: str = Field("127.0.0.1", description="address that the API listens on; 0.0.0.0: every one")
    port: int = Field(30000, ge=0, le=65535, description="port that the API listens on; 0: any free one")
    api_key: Words = Field((), repr=False, description="keys that clients must present; none: the door is open")
    cors_origins: Words = Field((), description="web origins that a browser may call from; none: CORS is off")
    max_body_bytes: int = Field(8 << 20, gt=0, description="largest request body")
    max_messages: int = Field(2048, gt=0, description="most messages in one request")
    tool_dialect: Literal[
        "auto", "none", "harmony", "deepseek", "pythonic", "qwen3_coder", "hermes", "mistral", "llama"] = Field(
        "auto", description="how models write calls of tools; auto: as their chat template shows")
    heartbeat_s: Seconds = Field(10.0, gt=0, description="longest silence on a stream before a comment is sent")
    max_pending_entries: int = Field(256, gt=0, description="log entries kept in memory for a slow client")
    sweep_s: Seconds = Field(0.5, gt=0, description="silence after which a pod looks into a stream's log itself")
    disconnect_grace_s: Seconds = Field(
        2.0, ge=0, description="how long a job waits for its client to return; 0 cancels at once")
    reader_ttl_s: Seconds = Field(
        30.0, ge=3, description="how long a job whose pod died waits for a reader; outlives a Redis that stalls")

    # ── the line ──
    max_queued: int = Field(4096, gt=0, description="jobs in line, per shard, before submit refuses")
    max_tenant_choices: int = Field(4096, gt=0, description="live choices of one API key, per shard")
    max_redis_fraction: float = Field(0.85, gt=0, le=1, description="share of Redis' maxmemory before submit refuses")
    request_deadline_s: Seconds = Field(3600.0, gt=0, description="what a request may take, waiting included")
    retain_s: Seconds = Field(600.0, gt=0, description="how long the log of a finished answer is kept")
    store_s: Seconds = Field(86_400.0, gt=0, description="how long, where the answer is to be stored")
    max_tenant_stored_bytes: int = Field(
        512 << 20, gt=0, description="what one API key asked in requests that are stored, before more are refused")

    # ── files and batches ──
    max_file_bytes: int = Field(100 << 20, gt=0, description="largest file")
    max_tenant_file_bytes: int = Field(512 << 20, gt=0, description="all files of one API key, before it may add more")
    file_s: Seconds = Field(604_800.0, gt=0, description="how long a file is kept, and a batch that is over")
    batch_s: Seconds = Field(86_400.0, gt=0, description="how long a batch may take; then its rest is given up")

    # ── the worker ──
    model: str = Field("", description="folder or hub name of a model; empty: the built-in one")
    revision: str = Field("main", description="branch, tag or commit on the hub")
    served_model_name: Words = Field((), description="names that clients use; the first is the canonical one")
    shard: int = Field(0, ge=0, description="number of the shard that this worker serves")
    max_model_len: int | None = Field(None, ge=2, description="longest context, in tokens; none: the model's own")
    max_num_seqs: int = Field(64, gt=0, le=1024, description="choices that run at once")
    kv_cache_bytes: int | None = Field(
        None, gt=0, description="memory for keys and values, also kept ones; none: what is free, on a CPU up to 4 GiB")
    enable_prefix_caching: bool = Field(True, description="keep the computed beginnings of prompts")
    prefill_chunk_tokens: int | None = Field(
        None, ge=16, description="prompt tokens in a step; none: 256, with AMX or on a GPU 512; fewer on slow machines")
    exact_replay_max_tokens: int = Field(
        4096, ge=0, description="where chunks round otherwise than rows, longer answers continue from a prefill: "
                                "valid, not exact")
    num_speculative_tokens: int = Field(8, ge=0, le=31, description="most draft tokens of an answer in a step; 0: none")
    numerics: Literal["exact", "fast"] = Field(
        "exact", description="fast: prompts and answers share a forward; no answer is promised to be the same again")
    flush_s: Seconds = Field(0.025, ge=0, description="tokens that come faster than this are gathered into one delta")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it computes; auto: a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="what the model computes in")
    quantization: Literal["none", "int8"] = Field(
        "none", description="int8: weights in half the memory, on a GPU; other answers, and a name of their own")
    threads: int = Field(
        0, ge=0, le=1024,
        description="threads of a forward; 0: all, or OMP_NUM_THREADS; one less for a small model")
    step_timeout_s: Seconds = Field(30.0, gt=0, description="a step that takes longer hangs: the worker ends itself")

    # ── the protocol ──
    lease_s: Seconds = Field(3.0, gt=0, description="silence after which a worker's jobs go to others")
    idle_poll_s: Seconds = Field(1.0, gt=0, description="an idle worker claims at least this often; under lease_s / 2")
    reap_s: Seconds = Field(0.5, gt=0, description="how often anyone looks for expired leases and deadlines")
    announce_s: Seconds = Field(1.0, gt=0, description="how often a worker says that it is there")
    announce_ttl_s: Seconds = Field(10.0, gt=0, description="how long its word is believed")
    patience_s: Seconds = Field(2.0, ge=0, description="how long a job waits for a like worker, or for an empty one")
    prefix_patience_s: Seconds = Field(
        0.2, ge=0, description="how long a job waits for the worker that holds its prefix")
    allow_other_weights: bool = Field(False, description="continue answers that other weights have begun")
    max_attempts: int = Field(3, gt=0, description="leases lost in a row without progress before a job is given up")
    max_claims: int = Field(100, gt=0, description="claims of one job, whatever its progress")
    max_scan: int = Field(64, gt=0, description="jobs at the head of the line that one claim looks at")
    allow_no_aof: bool = Field(False, description="accept a Redis that forgets everything when it restarts")

    # ── `baton serve` ──
    apis: int = Field(1, ge=1, le=64, description="API processes, on one port")
    workers: int = Field(1, ge=0, le=64, description="worker processes")
    data_dir: str = Field("", description="where its Redis keeps its data; empty: ~/.local/state/baton/PORT")

    @field_validator("served_model_name", "api_key", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        parts = [value] if isinstance(value, str) else value    # a flag takes several, each of which may be a list
        return tuple(word.strip() for part in parts for word in part.split(",") if word.strip())

    @model_validator(mode="after")
    def _relations(self) -> Settings:
        # A worker that waits for a wake-up renews its lease only when it polls.
        if self.idle_poll_s > self.lease_s / 2:
            raise ValueError("idle_poll_s must be at most half of lease_s")
        if self.announce_ttl_s < 3 * self.announce_s:
            raise ValueError("announce_ttl_s must be at least three times announce_s")
        return self

    def environment(self) -> dict[str, str]:
        """What a child process needs in its environment to read these same settings."""
        return {PREFIX + name.upper(): ",".join(value) if isinstance(value, tuple) else str(value)
                for name, value in self if name in self.model_fields_set - SERVE_ONLY and value is not None}


def load(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from flags and the environment. Raises BrokenEnvironment, one line, when one is wrong."""
    refuse_unknown(environment)
    try:
        return Settings(**flags)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        where = f"{PREFIX}{name.upper()} (--{name.replace('_', '-')})" if name else "the settings"
        raise BrokenEnvironment(f"{where}: {first['msg']}") from None


def refuse_unknown(environment: Mapping[str, str]) -> None:
    """A misspelt variable would be ignored: raises BrokenEnvironment, which names the one that was meant."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for name in sorted(environment):
        if name.startswith(PREFIX) and not name.startswith(TEST_PREFIX) and name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise BrokenEnvironment(f"{name} is not a setting; did you mean {nearest}?")
