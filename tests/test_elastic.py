"""Layers on the leading slice: same numbers as a layer of the small size, and its gradients in the right place."""

import pytest
import torch
from torch import nn

from modeling_flextron.elastic import ElasticEmbedding, ElasticLinear, ElasticRMSNorm, project


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(None, 6), (5, 6), (None, 4), (3, 2)])
def test_linear(bias, rows, columns):
    layer = ElasticLinear(6, 8, bias=bias)
    small = nn.Linear(columns, rows or 8, bias=bias)
    small.weight.data = layer.weight.data[: rows or 8, :columns].clone()
    if bias:
        small.bias.data = layer.bias.data[: rows or 8].clone()
    x = torch.randn(2, 3, columns)
    torch.testing.assert_close(layer(x, rows), small(x))

    layer(x, rows).square().sum().backward()
    small(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad[: rows or 8, :columns], small.weight.grad)
    outside = layer.weight.grad.clone()
    outside[: rows or 8, :columns] = 0
    assert not outside.any()


def test_a_slice_is_a_view():
    layer = ElasticLinear(6, 8)
    weight, bias = layer.leading(4, 5)
    assert weight.data_ptr() == layer.weight.data_ptr() and bias.data_ptr() == layer.bias.data_ptr()


def test_embedding():
    layer = ElasticEmbedding(10, 6, padding_idx=0)
    ids = torch.tensor([[1, 2, 0]])
    torch.testing.assert_close(layer(ids, 4), nn.Embedding.forward(layer, ids)[..., :4])
    torch.testing.assert_close(layer(ids), nn.Embedding.forward(layer, ids))
    layer(ids, 4).sum().backward()
    assert not layer.weight.grad[:, 4:].any() and not layer.weight.grad[0].any() and layer.weight.grad[1, :4].all()


def test_norm_runs_over_the_active_channels_only():
    norm = ElasticRMSNorm(8, eps=1e-3)
    nn.init.normal_(norm.weight)
    small = nn.RMSNorm(5, eps=1e-3)
    small.weight.data = norm.weight.data[:5].clone()
    x = torch.randn(2, 5)
    torch.testing.assert_close(norm(x), small(x))
    assert norm(torch.randn(2, 8).bfloat16()).dtype == torch.float32  # weight decides, as in the stock class


def test_at_its_built_size_a_layer_is_called_with_its_input_alone():
    class Foreign(nn.Module):
        def forward(self, input):
            return input

    assert project(Foreign(), torch.ones(3), None).shape == (3,)
    with pytest.raises(ValueError, match="Foreign"):
        project(Foreign(), torch.ones(3), 2)
