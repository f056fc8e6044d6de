"""The HDF5 file of feature pyramids: its layout, writer, reader, verification and torch Dataset."""
