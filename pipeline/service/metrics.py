"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters of one replica, in a registry of their own."""

    def __init__(self, replica: str) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "clipmill_requests", "Requests answered", ["route", "status"], registry=self.registry
        )  # fmt: skip
        self._seconds = Histogram(
            "clipmill_request_seconds", "Time from a request's head to its answer", ["route"], buckets=_SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._batches = Histogram(
            "clipmill_batch_size", "Questions in one search, texts in one pass of the encoder", ["index", "kind"],
            buckets=_SIZES, registry=self.registry,
        )  # fmt: skip
        self._index = Gauge(
            "clipmill_index_info", "1 for the version that is served", ["index", "version"], registry=self.registry
        )
        self._keys = Gauge("clipmill_index_keys", "Keys in that version", ["index"], registry=self.registry)
        self._swaps = Counter("clipmill_index_swaps", "New versions taken up", ["index"], registry=self.registry)
        self._misses = Counter(
            "clipmill_index_refresh_failures", "New versions that could not be opened", ["index"],
            registry=self.registry,
        )  # fmt: skip
        self.running = 0
        running = Gauge("clipmill_requests_running", "Requests under way", registry=self.registry)
        running.set_function(lambda: self.running)
        Gauge("clipmill_replica_info", "1", ["replica"], registry=self.registry).labels(replica).set(1)
        self._known: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def request(self, route: str, status: int, seconds: float) -> None:
        children = self._known.get((route, status))
        if children is None:  # looking a child up by its labels costs more than counting
            children = self._requests.labels(route, status), self._seconds.labels(route)
            self._known[route, status] = children
        children[0].inc()
        children[1].observe(seconds)

    def batch(self, index: str, kind: str) -> Histogram:
        """Whose ``observe`` takes the sizes of batches."""
        return self._batches.labels(index, kind)

    def swapped(self, index: str) -> None:
        self._swaps.labels(index).inc()

    def refresh_failed(self, index: str) -> None:
        self._misses.labels(index).inc()

    def text(self, indices: Iterable[tuple[str, str, int]]) -> bytes:
        """The exposition, with (name, version, keys) of each index as they are now."""
        self._index.clear()
        for name, version, keys in indices:
            self._index.labels(name, version).set(1)
            self._keys.labels(name).set(keys)
        return generate_latest(self.registry)
