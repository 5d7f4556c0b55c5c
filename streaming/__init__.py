"""Convert weights of any size between Hugging Face folders and checkpoints, within a limit of memory.

A conversion reads a WeightSource a block of rows at a time and writes portions: files, or parts of files, that are
complete on their own. Several processes write portions; a conversion that was killed writes those that are missing.
"""
