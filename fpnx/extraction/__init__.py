"""Extraction in one process, from image files to an output.

`run.run_extraction` makes a plan of all images, sizes and shapes (`plan`). The pipeline (`pipeline`) then takes each
image through its decode threads, a compute thread and the writer thread, which puts the features into a sink: the
HDF5 file (`sink`) or heatmaps as PNG files (`png_sink`). The sink's outcome, what is done and what failed, becomes the
run's result; an output for an object store is uploaded at the end (`upload`).
"""
