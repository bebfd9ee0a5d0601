"""Shards → actors on a Ray cluster that is there, each of which writes the files of its own shards."""

from __future__ import annotations

import pickle
import socket
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from .chunks import Shard
from .failures import ScoreError, failure
from .part_files import Totals
from .pipeline import Job
from .processes import GIVEN, TICK_SECONDS, Watcher

CONNECT_SECONDS = 5.0


def connect(address: str) -> float:
    """Join the cluster, unless this process has; its CPUs.

    address: of Ray, "auto" for the one of this machine or of `RAY_ADDRESS`.
    Raises `ModuleNotFoundError` without Ray, `ValueError` where no cluster answers.
    """
    import ray

    if not ray.is_initialized():
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"ray={address!r}: no cluster of Ray answers ({first}); start one with `ray start --head`, give its "
                "address, or leave --ray out"
            ) from error
    return float(ray.cluster_resources().get("CPU", 0))


def _knock(address: str) -> None:
    """`OSError` where nothing listens at host:port, for which Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()


def check_room(cpus: float, workers: int, threads: int) -> None:
    """`ValueError`, with the sum, unless the actors leave one CPU to Ray's other tasks, without which it may hang."""
    if workers * threads + 1 > cpus:
        raise ValueError(
            f"{workers} workers × {threads} CPUs + 1 for Ray's other tasks = {workers * threads + 1} CPUs, but the "
            f"cluster has {cpus:g}; take fewer workers or threads per worker"
        )


def run_on_ray(job: Job, shards: Sequence[Shard], workers: int, watcher: Watcher) -> None:
    """Answer all shards; returns when their files are there.

    Arguments and errors as of `processes.run_in_processes`.
    """
    import ray

    content = ray.put(pickle.dumps(job))
    kind = _actor(job)
    actors = [kind.remote(content) for _ in range(min(workers, len(shards)))]
    todo, deaths = deque(shards), Counter[int]()
    given: dict[Any, tuple[int, Shard]] = {}
    try:
        ready = {actor.plan.remote(): i for i, actor in enumerate(actors)}
        while todo or given:
            for i, actor in enumerate(actors):
                while todo and i not in ready.values() and sum(number == i for number, _ in given.values()) < GIVEN:
                    shard = todo.popleft()
                    given[actor.score.remote(shard)] = i, shard
            found, _ = ray.wait([*ready, *given], timeout=TICK_SECONDS)
            for ref in found:
                try:
                    value = ray.get(ref)
                except ray.exceptions.RayActorError as error:
                    if ref in ready:
                        raise ScoreError(f"an actor of Ray ended before its first shard: {error}") from error
                    i, shard = given[ref]
                    deaths[shard.number] += 1
                    if deaths[shard.number] > 1:
                        raise ScoreError(f"an actor of Ray ended at shard {shard.number}, twice: {error}") from error
                    for other in [r for r, (number, _) in given.items() if number == i]:
                        todo.appendleft(given.pop(other)[1])
                    actors[i] = kind.remote(content)
                    ready[actors[i].plan.remote()] = i
                    break  # other references to that actor are gone
                except ray.exceptions.RayTaskError as error:
                    cause = error.cause if isinstance(error.cause, Exception) else error
                    if ref in ready and isinstance(cause, ValueError):
                        raise ValueError(str(cause)) from error
                    number = given[ref][1].number if ref in given else -1
                    raise failure(type(cause).__name__, str(cause), number) from error
                if ref in ready:
                    del ready[ref]
                    watcher.ready()
                else:
                    watcher.done(given.pop(ref)[1], Totals(**value))
            watcher.tick([])
    finally:
        for actor in actors:
            ray.kill(actor)


def _actor(job: Job) -> Any:
    import ray

    gpus = {"num_gpus": 1} if job.device == "cuda" else {}

    # As many calls at a time as it has shards, and one more.
    @ray.remote(num_cpus=job.threads, max_concurrency=GIVEN + 1, **gpus)
    class Scorer:
        def __init__(self, content: bytes) -> None:
            import torch

            from eefast.scoring.pipeline import Pipeline

            told = pickle.loads(content)
            torch.set_num_threads(told.threads)
            self.pipeline = Pipeline(told)

        def plan(self) -> str:
            return self.pipeline.plan

        def score(self, shard: Shard) -> dict[str, Any]:
            from dataclasses import asdict

            return asdict(self.pipeline.submit(shard).result())

    return Scorer
