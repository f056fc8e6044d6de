"""Heatmaps of stored features, drawn as matplotlib figures, PNG files or one HTML page."""
