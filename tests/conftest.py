"""One thread for small networks: more of them wait for each other longer than they compute."""

import torch

torch.set_num_threads(1)
