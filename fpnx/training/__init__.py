"""Training of a neck and a head on labelled images or on stored taps."""
