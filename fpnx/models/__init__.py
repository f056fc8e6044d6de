"""Backbones, necks, the weights that they are given, and the preprocessing that belongs to the weights."""
