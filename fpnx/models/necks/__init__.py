"""Necks: modules that turn taps into pyramid levels."""
