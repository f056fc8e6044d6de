"""What is in images: objects, classes and masks, from a model with its head, through the pipeline of extraction."""
