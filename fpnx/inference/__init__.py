"""Fast execution of a model: folded and packed convolutions on the CPU, streams and graphs on CUDA."""
