"""The HDF5 format: written so that what it calls done is whole, read lazily, verified, and read as a torch Dataset."""
