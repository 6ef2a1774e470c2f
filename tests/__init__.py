"""The tests mirror the package; before any of them, what the stock processors and the kernels need is arranged."""

import os

import torch

from tests.stock import declare_operators, find_torchvision

find_torchvision()
declare_operators()
if not torch.cuda.is_available():
    # Read when triton is imported, which anything may do first; without a GPU its kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
