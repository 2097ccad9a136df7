"""The textbook example of pruning: LeNet, L1 unstructured, four layers, any sparsity.

Trains a LeNet on scikit-learn's handwritten digits, sets the smallest weights of its two
convolutions and two linear layers to zero, trains on for a little while with the zeros held, saves
the network, loads it into a fresh instance, and prints accuracy and file sizes before and after.
PyTorch's own way (torch.nn.utils.prune) stores every weight twice, as weight_orig and weight_mask;
here the zeros cost one bit each.

Run it: python examples/lenet_l1_unstructured.py --sparsity 0.9
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rarefy as rf
from rarefy.pruning.sparsity.masks import sparsity
from rarefy.tasks.vision import digits


class LeNet(nn.Module):
    """Two convolutions, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 5, padding=2)
        self.conv2 = nn.Conv2d(16, 32, 5)
        self.fc1 = nn.Linear(32 * 6 * 6, 120)
        self.fc2 = nn.Linear(120, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 1, 32, 32) -> logits (B, 10)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits


def main() -> None:
    """Train, prune, fine-tune, save, load, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.9, help="share of weights to remove")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of training")
    chosen = parser.parse_args()

    data = digits()
    torch.manual_seed(0)
    dense = rf.train(LeNet(), data.train, epochs=chosen.epochs, lr=0.05, progress=False)

    budget = rf.Budget(sparsity=chosen.sparsity, scope="local")  # that share of every layer
    example = torch.zeros(1, 1, 32, 32)
    pruned = rf.prune(dense, example, budget, structure="weight")
    tuned = rf.train(
        pruned, data.train, epochs=2, lr=0.01, progress=False, after_step=rf.hold(pruned)
    )

    with tempfile.TemporaryDirectory() as folder:
        dense_file = rf.save(dense, Path(folder) / "dense.safetensors")
        sparse_file = rf.save(tuned, Path(folder) / "sparse.safetensors")
        loaded = rf.load(sparse_file, LeNet())
        sizes = dense_file.stat().st_size, sparse_file.stat().st_size

    print(f"dense        accuracy {rf.evaluate(dense, data.test):.2%}   {sizes[0]:>9,} bytes")
    print(f"pruned       accuracy {rf.evaluate(pruned, data.test):.2%}")
    print(f"fine-tuned   accuracy {rf.evaluate(tuned, data.test):.2%}")
    print(f"loaded       accuracy {rf.evaluate(loaded, data.test):.2%}   {sizes[1]:>9,} bytes")
    print(f"sparsity {sparsity(loaded):.4f}, the file is {sizes[0] / sizes[1]:.1f} times smaller")


if __name__ == "__main__":
    main()
