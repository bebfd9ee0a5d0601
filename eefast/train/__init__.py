"""A data set → a trained early-exit network with its thresholds, see `eefast.train.run.train`."""
