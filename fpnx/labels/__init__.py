"""Label files of every supported format, read into one typed result."""
