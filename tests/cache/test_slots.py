"""Tensors in one piece per device, none over another."""

from __future__ import annotations

import torch

from statekv.cache.slots import one_block

CPU, META = torch.device("cpu"), torch.device("meta")


def test_layers_of_any_size_share_a_block_and_do_not_overlap() -> None:
    shapes = [(2, 3, 4), (2, 0, 4), (2, 5, 4), (1, 1)]
    tensors = one_block(shapes, torch.int32, [CPU] * 4)
    assert [tuple(tensor.shape) for tensor in tensors] == shapes
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    assert tensors[0].untyped_storage().nbytes() == 4 * sum(tensor.numel() for tensor in tensors)


def test_each_device_has_its_own_block() -> None:
    tensors = one_block([(2,), (3,), (4,)], torch.float32, [CPU, META, CPU])
    assert [tensor.device.type for tensor in tensors] == ["cpu", "meta", "cpu"]
    assert tensors[0].untyped_storage().nbytes() == 24
    assert tensors[1].untyped_storage().nbytes() == 12
