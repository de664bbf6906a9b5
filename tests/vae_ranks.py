"""Some optimizer steps of GAN training, on one process or, started by torchrun, on several.

Writes the gradients of the first step and the weights after the last, of both networks, having
checked that they are the same on all ranks.
"""

import sys
from pathlib import Path

import torch
from recipes import tiny

from ldm.build import open_data
from ldm.checkpoint import save_tensors
from ldm.data.loader import Loader
from ldm.training.optim import make_optimizer
from ldm.training.session import Progress, Session, Update
from ldm.training.vae import distribute, make_networks
from ldm.training.vae_loss import trained_part
from ldm.training.vae_step import accumulate

STEPS = 4
GAN = (
    "gan.loss=hinge",
    "gan.start_step=0",
    "gan.discriminator_first_steps=0",
    "gan.ramp_steps=0",
    "gan.layers=2",
    "gan.width=8",
    "gan.r1_weight=1",
    "gan.r1_every=2",
    "train.precision=fp32",
)
EVERYTHING = (
    *GAN,
    "loss.perceptual=gradients",
    "loss.learn_logvar=true",
    "equivariance.weight=0.5",
)


def start(config):
    """Session, networks and loader of a run, as `train_vae` makes them."""
    session = Session(config)
    networks = make_networks(config, session)
    source, _ = open_data(config.data)
    loader = Loader(
        source,
        seed=config.train.seed,
        batch_size=config.train.batch_size,
        image_px=config.data.image_px,
        rank=session.rank,
        world_size=session.world_size,
        accumulation=config.train.accumulation,
    )
    distribute(networks, session)
    return session, networks, loader


def parameters_of(networks):
    """The parameters of both networks, by name."""
    parts = {"vae": networks.passes, "discriminator": networks.adversary.net}
    return {f"{n}/{key}": p for n, net in parts.items() for key, p in net.named_parameters()}


def gradients_of(networks):
    """Copies of their gradients; None where there is none."""
    found = {name: parameter.grad for name, parameter in parameters_of(networks).items()}
    return {name: None if grad is None else grad.clone() for name, grad in found.items()}


def run(config):
    """(gradients of the first step, weights after STEPS of them, adaptive weights on the way)."""
    session, networks, loader = start(config)
    batches = loader.batches(0)
    model, adversary = trained_part(networks.passes), networks.adversary
    optimizer, progress = make_optimizer(model, config.optim), Progress()
    weights, found = [], {}
    for step in range(STEPS):
        weights.append(float(accumulate(session, networks, batches, config, step)["gan_weight"]))
        if step == 0:
            found |= {f"gradient of {name}": grad for name, grad in gradients_of(networks).items()}
        updates = [Update(networks.trained, optimizer, 1e-3, 1.0), adversary.update(step)]
        assert session.optimizer_steps(updates, progress) is not None
    found |= {name: p.detach() for name, p in parameters_of(networks).items()}
    flat = torch.cat([value.flatten() for value in found.values()])
    ranks = session.gather(flat[None])
    assert all(row.equal(ranks[0]) for row in ranks), "ranks have drifted apart"
    return found, weights


if __name__ == "__main__":
    torch.set_num_threads(1)
    for accumulation in ("1", "2"):
        folder = Path(sys.argv[1]) / accumulation
        config = tiny("vae", folder, *EVERYTHING, f"train.accumulation={accumulation}")
        tensors, weights = run(config)
        if Session(config).is_main:
            folder.mkdir(parents=True, exist_ok=True)
            tensors["gan_weight"] = torch.tensor(weights)
            save_tensors(folder / "out.safetensors", tensors)
