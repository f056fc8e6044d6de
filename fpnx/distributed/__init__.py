"""Extraction by many workers: cutting a run into shards, handing them to a backend, and recovering from deaths."""
