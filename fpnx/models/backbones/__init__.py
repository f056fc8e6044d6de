"""Backbone construction, stage detection and extraction of the taps C2 to C5."""
