"""Scores of predictions against labels: detection, classification, semantic segmentation."""
