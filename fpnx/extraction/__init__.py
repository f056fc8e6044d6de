"""One process from images to an output: the plan, the pipeline of threads, and the sinks that store or draw."""
