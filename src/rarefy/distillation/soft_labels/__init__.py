"""The answers of a teacher as a data set: written once, checked, read faster than recomputed.

:func:`write_soft_labels` makes a store and :class:`SoftLabels` reads it. What a record holds is one
of :class:`Dense`, :class:`TopK`, :class:`Sampled` and :class:`Outputs`; :class:`Replay` repeats the
augmentation that the teacher saw, with :class:`Mixup` or :class:`CutMix` where wanted. The format
on disk is described in ``docs/soft_labels.md``.
"""

from rarefy.distillation.soft_labels.read import SoftLabels
from rarefy.distillation.soft_labels.records import Dense, Outputs, Sampled, TopK
from rarefy.distillation.soft_labels.views import CutMix, Mixup, Replay
from rarefy.distillation.soft_labels.write import write_soft_labels

__all__ = [
    "CutMix",
    "Dense",
    "Mixup",
    "Outputs",
    "Replay",
    "Sampled",
    "SoftLabels",
    "TopK",
    "write_soft_labels",
]
