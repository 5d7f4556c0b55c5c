"""Folders of weights in other formats than the published one, seen as the tensors of the published one.

    folder  ->  scales (FP8)  ->  fused experts  ->  names of a GLM-V model

Every format is a view of a WeightSource: it reads nothing before rows are asked for, and no more than they need.
`model.weights.formats.opened` looks at what a folder contains and puts the views over it that it needs.
"""
