"""Training low-rank adapters in place of the network: what is trained, saved and averaged."""

from __future__ import annotations

from torch import nn

from ldm.build import seeded
from ldm.config.models import LoraConfig
from ldm.models.lora import add_adapters


def trained_part(net: nn.Module, config: LoraConfig | None, seed: int) -> nn.Module:
    """What of `net` is trained: all of it, or adapters that are put into it here, in place."""
    if config is None:
        return net
    alpha = float(config.rank) if config.alpha is None else config.alpha

    def make() -> nn.Module:
        add_adapters(net, rank=config.rank, alpha=alpha, targets=config.targets)
        return net

    seeded(make, seed)
    return Adapters(net)


class Adapters(nn.Module):
    """The adapters of a network under their own names: the parameters that training changes.

    Shares them with the network, so what is loaded or averaged here is at work there.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                self.register_parameter(name.replace(".", "/"), parameter)
