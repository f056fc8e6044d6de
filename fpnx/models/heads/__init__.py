"""Heads: modules that turn pyramid levels into classes, boxes or masks."""
