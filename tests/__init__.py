"""The tests mirror the package; before any of them, what the stock processors need is made importable."""

from tests.stock import declare_operators, find_torchvision

find_torchvision()
declare_operators()
