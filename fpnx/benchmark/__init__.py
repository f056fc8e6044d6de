"""Benchmark of the pipeline: stage timings, operation counts, hardware limits and a plain PyTorch baseline."""
