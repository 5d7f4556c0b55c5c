"""The plan of a cluster job, made on one machine: what every rank holds, sends and computes.

The real modules of a rank are built on torch's fake process group, with tensors that have a shape and no memory.
"""
