"""What this pod counts, and what it reads from Redis for a scrape, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from shared import connection
from shared.queue import Queue

LOOK_TIMEOUT_S = 2.0                                    # for each shard; scrapers give up after ten seconds
TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("baton_http_requests", "Answers sent, by status.", ["status"], registry=self.registry)
        self.streams = Gauge("baton_streams", "Requests that wait for tokens.", registry=self.registry)
        self.ttft_s = Histogram("baton_time_to_first_token_seconds", "From request to first event.",
                                buckets=TTFT_BUCKETS_S, registry=self.registry)
        self._jobs = Gauge("baton_jobs", "Live jobs of a shard.", ["shard", "state"], registry=self.registry)
        self._totals = Gauge("baton_jobs_total", "Jobs since the shard began, by what happened to them.",
                             ["shard", "outcome"], registry=self.registry)
        self._workers = Gauge("baton_workers", "Workers with a lease.", ["shard"], registry=self.registry)
        self._worker_gauges = {name: Gauge(f"baton_worker_{name}", text, ["shard", "worker"], registry=self.registry)
                               for name, text in WORKER_GAUGES.items()}

    async def scrape(self, queues: Iterable[Queue], num_streams: int) -> bytes:
        """Shards whose Redis does not answer in time are left out."""
        self.streams.set(num_streams)
        for gauge in (self._jobs, self._totals, self._workers, *self._worker_gauges.values()):
            gauge.clear()                               # workers that have left leave no line behind
        await connection.for_each(queues, self._look, LOOK_TIMEOUT_S)
        return generate_latest(self.registry)

    async def _look(self, queue: Queue) -> None:
        counters, shard = dict(await queue.counters()), queue.shard.id
        num_queued, num_live = counters.pop("queued"), counters.pop("live")
        self._jobs.labels(shard, "queued").set(num_queued)
        self._jobs.labels(shard, "running").set(num_live - num_queued)
        for outcome, total in counters.items():
            self._totals.labels(shard, outcome).set(total)
        workers = await queue.workers()
        self._workers.labels(shard).set(len(workers))
        for worker in workers:
            for name, gauge in self._worker_gauges.items():
                if name in worker:
                    gauge.labels(shard, worker["name"]).set(float(worker[name]))


WORKER_GAUGES = {
    "num_running": "Choices in the batch.",
    "num_waiting": "Choices that wait for a slot, or for memory.",
    "num_preempted": "Choices that had to give their memory to older ones, since the worker began.",
    "num_draft_tokens": "Draft tokens that were computed, since the worker began.",
    "num_accepted_tokens": "Draft tokens that became part of an answer, since the worker began.",
    "step_p50_ms": "Median time of a step.",
    "step_p99_ms": "99th percentile of the time of a step.",
    "tokens_per_s": "Tokens drawn, over the last announcement interval.",
}
