"""Paths, folders, archives and URLs to upright 8-bit RGB images.

`listing` makes the list of images of a run, with `discovery` (what one path stands for) and `manifest` (list files).
`reading` opens the bytes of one image, `tar_members` those in tar archives, by the offsets from `tar_index`.
`decoding` turns bytes into RGB and applies the EXIF orientation; `tiff` reads TIFFs that Pillow does not,
`value_mapping` maps values of any type to 0..255, `color_profile` recognises sRGB.
"""
