"""Necks: modules that turn taps (the backbone's maps C2 to C5) into pyramid levels.

`base` is the interface, `registry` has the necks by the names that `--pyramid` takes. `PyramidModel.fpn` holds the neck
of a model, of whichever kind, so that state dicts keep torchvision's names.
"""
