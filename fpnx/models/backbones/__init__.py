"""Backbones: a named network or a caller's module, cut where its stages end, gives the taps C2 to C5."""
