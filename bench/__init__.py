"""Measurements, each runnable alone: `python -m bench.cpu`, `bench.serve_http`, `bench.profile_cpu`. Never installed."""
