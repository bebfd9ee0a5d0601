"""Files of unknown origin ↔ networks: read within limits, checked, built; written whole."""
