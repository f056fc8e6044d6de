"""One run on many workers: shards, the processes or machines that take them, and what happens when one dies."""
