"""The HTML page: one file that shows images, maps and similarities without a server."""
