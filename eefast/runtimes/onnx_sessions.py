"""Stage → the same stage run by ONNX Runtime, which reads and writes PyTorch's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .onnx_models import ONNX_NEEDS, OUTPUTS, missing, onnx_stage
from .stage import RuntimeStage


def session(model: bytes, threads: int, adjust: Callable[[Any], object] = lambda options: None) -> Any:
    """A session on the CPU. adjust: changes its options, which are the defaults but for the number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    adjust(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def spin_briefly(options: Any) -> None:
    """Threads spin for 50 µs between two operators, not after a call.

    Longer, they would take the cores from PyTorch's and from other sessions'; waking them takes as long as a small
    operator. Before ONNX Runtime 1.26, which has no such limit, they do not spin at all.
    """
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 26):
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    options.add_session_config_entry("session.force_spinning_stop", "1")


class OnnxRuntime:
    name, quick = "ONNX Runtime", True

    def missing(self) -> str:
        return missing(ONNX_NEEDS)

    def build(self, stage: nn.Module, example: Tensor, threads: int) -> nn.Module:
        import numpy

        model, shapes = onnx_stage(stage, example)
        made = session(model, threads, spin_briefly)
        # One binding serves one call at a time. Making it, or binding again, takes as long as a small layer.
        idle: list[tuple[Any, list[Any]]] = []

        def run(features: Tensor, written: Sequence[Tensor]) -> None:
            try:
                binding, bound = idle.pop()
            except IndexError:
                binding, bound = made.io_binding(), []
            wanted = [(features.data_ptr(), features.shape), *((part.data_ptr(), part.shape) for part in written)]
            if bound != wanted:
                (read, shape), *places = wanted
                binding.bind_input("x", "cpu", 0, numpy.float32, tuple(shape), read)
                for name, (place, shape) in zip(OUTPUTS, places, strict=False):
                    binding.bind_output(name, "cpu", 0, numpy.float32, tuple(shape), place)
            made.run_with_iobinding(binding)
            idle.append((binding, wanted))

        return RuntimeStage(run, stage, example, shapes, self.name)
