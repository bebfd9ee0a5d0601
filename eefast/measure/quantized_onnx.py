"""ONNX models in float32 and images → the same models by ONNX Runtime's `quantize_static`: QDQ, U8S8, per channel."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BATCH_SIZE = 16
ON_MAPS = ("Conv", "Relu", "Add", "MaxPool", "AveragePool", "GlobalAveragePool")
"""What works on maps: with these alone, confidences keep the resolution of float32."""


def quantized(models: Sequence[bytes], images: Any, only: Sequence[str] = ()) -> list[bytes]:
    """models: of one input "x", the first one's the images, each other's the last output of the one before.

    images: float32 array [N, C, H, W], from which ranges are taken; only: types of nodes, by default all.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, model in enumerate(models):
            _float32(folder, i).write_bytes(model)
        np.save(folder / "images.npy", images)
        # The quantiser opens sessions with threads of their own, which ONNX Runtime forbids where sessions share them.
        done = subprocess.run([sys.executable, "-m", __name__, name, *only], capture_output=True, text=True)
        if done.returncode:
            last = [f"exit code {done.returncode}", *done.stderr.strip().splitlines()][-1]
            raise RuntimeError(f"quantize_static: {last}")
        return [_int8(folder, i).read_bytes() for i in range(len(models))]


def _float32(folder: Path, i: int) -> Path:
    return folder / f"{i}.onnx"


def _int8(folder: Path, i: int) -> Path:
    return folder / f"{i} int8.onnx"


def _quantize(folder: Path, only: Sequence[str]) -> None:
    from onnxruntime import InferenceSession
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inputs = np.load(folder / "images.npy")
    for i in range(len(list(folder.glob("*.onnx")))):
        prepared = folder / "prepared"
        # Infers shapes by onnx; what infers them symbolically, too, is for transformers and needs another package.
        quant_pre_process(str(_float32(folder, i)), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared), str(_int8(folder, i)), _reader(inputs),
            quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=list(only) or None,
        )  # fmt: skip
        inputs = InferenceSession(_float32(folder, i), providers=["CPUExecutionProvider"]).run(None, {"x": inputs})[-1]


def _reader(inputs: Any) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    def batches() -> Iterator[dict[str, Any]]:
        for i in range(0, len(inputs), BATCH_SIZE):
            yield {"x": inputs[i : i + BATCH_SIZE]}

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        waiting = batches()

        def get_next(self) -> Any:
            return next(self.waiting, None)

    return Reader()


if __name__ == "__main__":
    _quantize(Path(sys.argv[1]), sys.argv[2:])
