"""Tests never use the network, and one thread each: contention makes torch many times slower."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

torch.set_num_threads(1)
