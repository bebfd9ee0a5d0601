"""From images to a trained early-exit network: data, losses, the Lightning module and the run that joins them."""
