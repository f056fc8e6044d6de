"""A self-contained HTML page that shows images, heatmaps and similarities without a server."""
