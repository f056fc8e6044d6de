"""Timings of every stage, costs, and what the machine could reach."""
