"""Scripts that measure mosaicdiff, one question each; run them as `python -m benchmarks.NAME`."""
