"""One module for each command; each is a function that Python code can call."""
