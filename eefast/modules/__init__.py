"""Modules of any origin → graphs of what they compute, and copies to try things on."""
