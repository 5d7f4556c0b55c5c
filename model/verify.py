"""How thoroughly the files of a checkpoint are checked before they are read."""

VERIFY = ("full", "sizes")  # full: their sizes and checksums
