"""Losses as frozen values that take tensors and return a scalar tensor.

A loss of outputs is called as ``loss(logits, reference, mask=None)``. The reference is the
teacher's output (:class:`KD`, :class:`MSE`) or the true labels (:class:`CrossEntropy`). A loss of
features is called as ``loss(student, teacher, mask=None)`` and bound to modules by ``at``. Terms
add and scale, by numbers or by schedules::

    0.9 * KD(temperature=4) + Linear(100, 0, 5000) * SP().at("layer3")

Conventions that all of them share:

* Logits are ``(B, C)``, or ``(B, L, C)`` for sequences: the classes are the **last** dimension.
  Any other layout, such as ``(B, C, H, W)`` for segmentation, is named: ``KD(dim=1)``.
* A loss of logits sums over the classes (:class:`MSE` averages) and averages over all examples and
  positions together, so that its size depends on neither the batch nor the length.
* ``mask`` has the shape of the logits without the class dimension; positions where it is 0 or
  False count for nothing, whatever they hold. Where nothing counts, the loss is 0.
* Half-precision tensors are converted to float32 first, also under autocast; float64 stays
  float64.
* The teacher's side receives no gradients.
"""

from rarefy.distillation.losses.base import At, FeatureLoss, Loss, Weighted
from rarefy.distillation.losses.features import FitNet
from rarefy.distillation.losses.labels import CrossEntropy
from rarefy.distillation.losses.layouts import IGNORE, class_dim, label_dim
from rarefy.distillation.losses.relations import SP
from rarefy.distillation.losses.responses import KD, MSE

__all__ = [
    "IGNORE",
    "KD",
    "MSE",
    "SP",
    "At",
    "CrossEntropy",
    "FeatureLoss",
    "FitNet",
    "Loss",
    "Weighted",
    "class_dim",
    "label_dim",
]
