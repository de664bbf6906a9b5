"""`torch.compile` takes a DiT as one graph, whatever conditions it and whatever the size."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from ldm.models.dit import DiT, DiTConfig
from ldm.models.dit_config import CONDITIONINGS
from ldm.models.routing import Routing
from ldm.types import TextEmbedding

POSITIONS = (
    {"base_size": 4},
    {"positions": "learned", "base_size": 4},
    {"positions": "rope", "base_size": 4, "rope_scaling": "ntk"},
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def net_of(num_layers=2, **changes):
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "hidden_size": 32, "head_dim": 16, "text_dim": 8}
    net = DiT(DiTConfig(num_layers=num_layers, **sizes, **changes))
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    return net


def inputs(batch=2, height=8, width=8, classes=None):
    text = TextEmbedding(
        torch.randn(batch, 5, 8),
        torch.arange(5).expand(batch, -1) < 3,
        None if classes is None else torch.eye(classes + 1)[:batch],
    )
    return torch.randn(batch, 4, height, width), 900 * torch.rand(batch), text


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_training_step_is_one_graph_and_its_gradients_are_those_of_eager(conditioning):
    net = net_of(1, conditioning=conditioning, num_classes=3)
    net.gradient_checkpointing = conditioning == "adaln_zero"
    given = inputs(classes=3)
    gradients = []
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        net.zero_grad()
        run(*given).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in net.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", POSITIONS)
def test_one_graph_serves_every_size(changes):
    net = net_of(**changes, num_layers=1).requires_grad_(False)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=counter)
    for size in ((2, 10, 14), (3, 12, 18), (4, 20, 10), (5, 22, 24)):
        given = inputs(*size)
        torch.testing.assert_close(compiled(*given), net(*given), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


def test_prepared_text_and_routed_tokens_are_one_graph_too():
    net = net_of(conditioning="adaln_zero", positions="rope").requires_grad_(False)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x, t, text = inputs()
    kept = net.prepare(text, [3.0])(3.0)
    torch.testing.assert_close(compiled(x, t, kept), net(x, t, kept), atol=1e-5, rtol=1e-5)
    for last in (None, 2):
        routing = Routing(torch.tensor([[0, 5, 9], [1, 2, 15]]), first=1, last=last)
        torch.testing.assert_close(
            compiled(x, t, text, routing), net(x, t, text, routing), atol=1e-5, rtol=1e-5
        )
