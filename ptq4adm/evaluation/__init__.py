"""Metrics for generated audio."""
