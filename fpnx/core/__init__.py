"""Errors, options, events, files and the plain records that all other packages share. Imports no other package."""
