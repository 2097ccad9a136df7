"""Spoken digits and a small convolutional network for the benchmarks.

The Free Spoken Digit Dataset: 3,000 recordings at 8 kHz; takes 0 to 4 of every speaker and digit
are the test set.
"""

import math

import numpy as np
import torch
from folder import loaders
from torch import Tensor, nn

RATE, WINDOW, HOP, BANDS, FRAMES = 8000, 256, 128, 40, 64


def filters() -> Tensor:
    """Triangular mel filters, (BANDS, WINDOW // 2 + 1)."""
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, BANDS + 2) / 2595) - 1)
    bins = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(rise, fall).clamp_min(0)


def features(wave: np.ndarray) -> Tensor:
    """A recording -> its logarithmic mel spectrogram (1, BANDS, FRAMES), cut or padded."""
    signal = torch.from_numpy(wave.astype(np.float32)) / 32768
    window = torch.hann_window(WINDOW)
    power = torch.stft(signal, WINDOW, HOP, window=window, return_complex=True).abs().square()
    mel = (filters() @ power + 1e-6).log()
    mel = mel[:, :FRAMES]
    padded = nn.functional.pad(mel, (0, FRAMES - mel.shape[1]), value=math.log(1e-6))
    return ((padded + 6) / 4)[None]


def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Spectrograms (N, 1, BANDS, FRAMES) and digits (N,) of the training and of the test set."""
    waves, labels, _, takes = loaders().fsdd()
    x = torch.stack([features(wave) for wave in waves])
    y, held_out = torch.from_numpy(labels).long(), torch.from_numpy(takes) < 5
    return (x[~held_out], y[~held_out]), (x[held_out], y[held_out])


def network(width: int = 64) -> nn.Module:
    """Five convolutions over time and frequency, then the mean of both; 70,000 parameters for a
    width of 64, 10,000 for 24."""
    layers: list[nn.Module] = []
    widths = (1, width // 4, width // 2, width // 2, width, width)
    for before, after, stride in zip(widths, widths[1:], (2, 1, 2, 1, 2), strict=False):
        layers += [
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
