"""Metrics of known answers, read as Prometheus reads them."""

from served import metrics as parsed

import eefast
from eefast.serving import Answer
from eefast.serving.levels import Levels
from eefast.serving.metrics import Metrics


def test_answers_are_counted_by_exit(small, serve):
    metrics, levels = Metrics(3), Levels("ab")
    assert parsed(metrics.text(None, levels).decode())['eefast_images_total{exit="2"}'] == 0
    for exit_index, cost, late in [(0, 0.25, False), (2, 1.0, True), (0, 0.25, False)]:
        metrics.answered(Answer(1, None, exit_index, 0.5, cost, 0.003, 0.25 * exit_index, late))
    metrics.requests.labels("200").inc()
    levels.at(0.95)
    server = serve(eefast.accelerate(small[0], engine="compact"), max_queue=7)
    found = parsed(metrics.text(server, levels).decode())
    expected = {
        'eefast_requests_total{code="200"}': 1,
        'eefast_images_total{exit="0"}': 2,
        'eefast_images_total{exit="1"}': 0,
        'eefast_images_total{exit="2"}': 1,
        'eefast_waiting_seconds_sum{exit="0"}': 0.006,
        'eefast_waiting_seconds_bucket{exit="0",le="0.002"}': 0,
        'eefast_waiting_seconds_bucket{exit="0",le="0.005"}': 2,
        'eefast_computing_seconds_sum{exit="2"}': 0.5,
        "eefast_cost_total": 1.5,
        "eefast_late_total": 1,
        "eefast_queue_length": 0,
        "eefast_queue_capacity": 7,
        'eefast_running{stage="1"}': 0,
        'eefast_running{stage="2"}': 0,
        "eefast_level": 1,
    }
    assert {name: found[name] for name in expected} == expected
