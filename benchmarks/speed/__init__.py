"""The benchmarks of docs/benchmarks.md: run them with `python benchmarks/bench.py`."""
