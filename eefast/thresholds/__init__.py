"""Outputs of all exits → thresholds, and what they are worth: accuracy, cost, exits."""
