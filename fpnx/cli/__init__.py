"""The terminal: the Typer app, its options, tables, progress and messages."""
