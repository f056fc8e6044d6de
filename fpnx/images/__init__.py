"""From paths, folders, archives and addresses to upright 8-bit RGB pictures."""
