"""Files of unknown origin ↔ networks: read within limits, checked, built; written as a whole."""

CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE = "config.json", "model.safetensors", "training.json"
"""The files of a folder that `EarlyExitNet.save` writes: how the network is built, its weights, its training record."""
