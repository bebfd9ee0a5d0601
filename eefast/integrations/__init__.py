"""Classes that other systems run: a file for each system."""
