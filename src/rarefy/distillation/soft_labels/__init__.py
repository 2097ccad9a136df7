"""The answers of a teacher as a data set: written once, checked, read faster than recomputed.

The format on disk is described in ``docs/soft_labels.md``.
"""
