"""`torch.compile` takes the UNet as one graph: plain, prepared and in training, at every size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

from tests.test_unet import CONFIGS, gradients, inputs, twins

TINY = dataclasses.replace(
    CONFIGS["sdxl"],
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=2,
    transformer_layers_per_block=1,
)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_one_graph_without_a_break_serves_every_size(prepared: bool) -> None:
    model, _ = twins(TINY, torch.float32)
    model.requires_grad_(False)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    # no side as large as a width: the compiler would take the two for one number
    for size in ((20, 28), (36, 44), (9, 13)):
        x, _, text = inputs(TINY, masked=True, size=size)
        at = model.prepare(text, [900.0, 3.0])
        for clock in (900.0, 3.0, 41.5):
            t = torch.full((2,), clock)
            given = at(clock) if prepared else text
            assert_close(compiled(x, t, given), model(x, t, text), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_training_step_has_the_gradients_of_eager() -> None:
    model, _ = twins(TINY, torch.float32)
    x, t, text = inputs(TINY, masked=True)
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        found.append(gradients(model, lambda run=run: run(x, t, text), x, text))
    for key, gradient in found[0].items():
        atol = 1e-4 * float(gradient.abs().max())
        assert_close(found[1][key], gradient, rtol=0, atol=atol, msg=key)
