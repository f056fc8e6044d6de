"""Where parameters come from: names, files and other frameworks' checkpoints."""
