"""From arrays to pictures: heatmaps, grids of panels, PNG files and one HTML page."""
