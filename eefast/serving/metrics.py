"""Requests, answers and the state of a server → metrics in the text format of Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .answer import Answer
from .levels import Levels
from .server import Server

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Metrics:
    """exits: number of exits, the final one included."""

    def __init__(self, exits: int) -> None:
        self.registry = CollectorRegistry()
        of: Any = {"registry": self.registry, "namespace": "eefast"}
        by_exit = [str(i) for i in range(exits)]
        self.requests = Counter(
            "requests", "Requests for predictions, by status code; 499: the client left.", ["code"], **of
        )
        images = Counter("images", "Images answered, by exit.", ["exit"], **of)
        waited = Histogram("waiting_seconds", "From arrival to the start of work.", ["exit"], buckets=SECONDS, **of)
        computed = Histogram(
            "computing_seconds", "From the start of work to the answer.", ["exit"], buckets=SECONDS, **of
        )
        self._by_exit = [(images.labels(e), waited.labels(e), computed.labels(e)) for e in by_exit]
        self.cost = Counter("cost", "Sum of the costs of all answers; ÷ images: the mean cost.", **of)
        self.late = Counter("late", "Answers after their deadline.", **of)
        self.failed = Counter("failed_images", "Images without an answer, in requests that had some.", **of)
        self.levels = Counter("images_by_level", "Images that were submitted, by level.", ["level"], **of)
        self.queue = Gauge("queue_length", "Images that wait.", **of)
        self.capacity = Gauge("queue_capacity", "Images that may wait.", **of)
        self.running = Gauge("running", "Images under way, by the stage that they wait for, or all.", ["stage"], **of)
        self.level = Gauge("level", "Number of the level for requests that name none; 0 is that of no load.", **of)

    def answered(self, answer: Answer) -> None:
        images, waited, computed = self._by_exit[answer.exit]
        images.inc()
        waited.observe(answer.waited)
        computed.observe(answer.computed)
        self.cost.inc(answer.cost)
        if answer.late:
            self.late.inc()

    def text(self, server: Server | None, levels: Levels) -> bytes:
        """All of it now; server: None while it is made."""
        self.level.set(levels.number)
        if server is not None:
            self.queue.set(server.waiting())
            self.capacity.set(server.max_queue)
            for stage, count in server.running().items():
                self.running.labels(stage).set(count)
        return generate_latest(self.registry)
