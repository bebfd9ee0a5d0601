"""ONNX Runtime's sessions: their threads, and that features are neither copied in nor out."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import images
from runtime_stages import stage

from eefast.planning.folding import fold_stage
from eefast.runtimes import onnx_sessions

BRIEFLY = {"session.intra_op.spin_duration_us": "50", "session.force_spinning_stop": "1"}


@pytest.mark.parametrize(
    ("version", "entries"),
    [("1.25.3", {"session.intra_op.allow_spinning": "0"}), ("1.26.0", BRIEFLY), ("2.0.0.dev1", BRIEFLY)],
)
def test_threads_are_as_many_as_asked_for_and_do_not_spin_after_a_call(
    version: str, entries: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    options = SimpleNamespace(add_session_config_entry=seen.__setitem__)
    made = SimpleNamespace(SessionOptions=lambda: options, InferenceSession=lambda *a, **k: (a, k), __version__=version)
    monkeypatch.setitem(sys.modules, "onnxruntime", made)
    arguments, more = onnx_sessions.session(b"model", 3, onnx_sessions.spin_briefly)
    assert (arguments, more) == ((b"model", options), {"providers": ["CPUExecutionProvider"]})
    assert options.intra_op_num_threads == 3
    assert seen == entries


@torch.no_grad()
def test_pytorchs_memory_is_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[tuple[Any, ...]] = []
    binding = SimpleNamespace(bind_input=lambda *a: bound.append(a), bind_output=lambda *a: bound.append(a))
    fake = SimpleNamespace(io_binding=lambda: binding, run_with_iobinding=lambda b: bound.append((b is binding,)))
    monkeypatch.setattr(onnx_sessions, "session", lambda model, threads, adjust: fake)
    monkeypatch.setattr(onnx_sessions, "onnx_stage", lambda stage, example: (b"", [torch.Size((4, 5, 7))]))
    made = onnx_sessions.OnnxRuntime().build(fold_stage(stage("residual"), torch.float32)[0], images(2, (3, 10, 14)), 1)
    x = images(5, (3, 10, 14))
    out = made(x)
    (*_, shape, read), (*_, written_shape, written), (ran,) = bound
    assert (shape, read) == ((5, 3, 10, 14), x.data_ptr())
    assert (written_shape, written) == ((5, 4, 5, 7), out.data_ptr())
    assert ran
