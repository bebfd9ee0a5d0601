"""A network → files that run without this package: a program per stage, ONNX models, or one compiled package."""
