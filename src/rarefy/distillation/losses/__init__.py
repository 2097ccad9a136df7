"""Losses as frozen values that take tensors and return a scalar tensor.

A loss of outputs is called as ``loss(logits, reference, mask=None)``. The reference is the
teacher's output (:class:`KD`, :class:`MSE`) or the true labels (:class:`CrossEntropy`). A loss of
features is called as ``loss(student, teacher, mask=None)`` and bound to modules by ``at``. Terms
add and scale, by numbers or by schedules::

    0.9 * KD(temperature=4) + Linear(100, 0, 5000) * SP().at("layer3")

* Classes: :class:`KD`, :class:`DKD`, :class:`NKD`, :class:`DIST`, :class:`MSE`, and
  :class:`Standardized` around any of them. :class:`DKD` and :class:`NKD` take ``labels=``, too.
* Next tokens: :class:`ReverseKL`, :class:`JSD`.
* Yes or no for each: :class:`Binary`. Real numbers: :class:`L1`, :class:`L2`, :class:`Huber`.
* Frames of speech: :class:`KD`, :class:`CTCPosteriors`.
* Labels, true ones or the teacher's: :class:`CrossEntropy`, :class:`CTC` (:func:`greedy_labels`).
* Features: :class:`FitNet`, :class:`Cosine`, :class:`AT`, :class:`VID`; of relations between
  examples :class:`SP`, :class:`RKD`, :class:`PKT`, :class:`CRD`; of dense prediction
  :class:`CWD`, :class:`MGD`, :class:`ReviewKD`; of transformers :class:`AttentionMaps`,
  :class:`MiniLM` (:func:`layer_map`).

Conventions that all of them share:

* Logits are ``(B, C)``, or ``(B, L, C)`` for sequences: the classes are the **last** dimension.
  Any other layout, such as ``(B, C, H, W)`` for segmentation, is named: ``KD(dim=1)``.
* A loss of logits sums over the classes (:class:`MSE` averages) and averages over all examples and
  positions together, so that its size depends on neither the batch nor the length.
* ``mask`` has the shape of the logits without the class dimension; positions where it is 0 or
  False count for nothing, whatever they hold. Where nothing counts, the loss is 0.
* Half-precision tensors are converted to float32 first, also under autocast; float64 stays
  float64.
* The teacher's side receives no gradients; of :class:`CRD` its embedding is learned by the head.
* Features of student and teacher that differ in shape go through the loss's ``head``, a module
  that is trained along and dropped afterwards.
"""

from rarefy.distillation.losses.base import At, FeatureLoss, Loss, Weighted
from rarefy.distillation.losses.contrastive import CRD
from rarefy.distillation.losses.dense import CWD, MGD, ReviewKD
from rarefy.distillation.losses.features import AT, VID, Cosine, FitNet
from rarefy.distillation.losses.generation import JSD, ReverseKL
from rarefy.distillation.losses.labels import CrossEntropy
from rarefy.distillation.losses.layouts import IGNORE, class_dim, label_dim
from rarefy.distillation.losses.outputs import L1, L2, Binary, Huber, Regression
from rarefy.distillation.losses.relations import PKT, RKD, SP
from rarefy.distillation.losses.responses import DIST, DKD, KD, MSE, NKD, Standardized
from rarefy.distillation.losses.speech import CTC, CTCPosteriors, greedy_labels
from rarefy.distillation.losses.transformers import AttentionMaps, MiniLM, layer_map

__all__ = [
    "AT",
    "CRD",
    "CTC",
    "CWD",
    "DIST",
    "DKD",
    "IGNORE",
    "JSD",
    "KD",
    "L1",
    "L2",
    "MGD",
    "MSE",
    "NKD",
    "PKT",
    "RKD",
    "SP",
    "VID",
    "At",
    "AttentionMaps",
    "Binary",
    "CTCPosteriors",
    "Cosine",
    "CrossEntropy",
    "FeatureLoss",
    "FitNet",
    "Huber",
    "Loss",
    "MiniLM",
    "Regression",
    "ReverseKL",
    "ReviewKD",
    "Standardized",
    "Weighted",
    "class_dim",
    "greedy_labels",
    "label_dim",
    "layer_map",
]
