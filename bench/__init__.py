"""Measurements, each runnable alone: `python -m bench.cpu`, `bench.serve`, `bench.profile_cpu`. Never installed."""
