"""What an experiment is: frozen, typed, documented, with unknown keys forbidden. Loads no torch.

One YAML file describes one experiment; `files.py` reads it and reports every mistake at once. The
rules that span several fields are in `rules.py`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from ldm.config.fields import (
    Count,
    Fraction,
    Integer,
    NotNegative,
    Number,
    Positive,
    Section,
    Weight,
    Whole,
    one_of,
)
from ldm.config.models import ClipModelConfig, Denoiser, DitConfig, LoraConfig, VaeModelConfig
from ldm.config.optim import OptimConfig
from ldm.config.vae import DetailCropConfig, EquivarianceConfig, GanConfig, VaeLossConfig
from ldm.diffusion.names import GUIDANCE_NAMES
from ldm.diffusion.prediction import PREDICTIONS
from ldm.diffusion.process import PROCESSES
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedule import DISTRIBUTIONS, PLACEMENTS, SPACINGS
from ldm.diffusion.weighting import WEIGHTINGS


class RunConfig(Section):
    """Where a run lives and how often it speaks."""

    dir: Annotated[str, Field(min_length=1)]
    """Run directory; the same command with the same directory continues the run."""
    save_every_steps: Count = 1_000
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Count = 2
    """Verified checkpoints kept on disk; older ones are deleted after a newer one is published."""
    log_every_steps: Count = 20
    """Optimizer steps between rows of metrics.jsonl."""
    tensorboard: bool = True
    """Also write TensorBoard files when the package is installed."""


class DataConfig(Section):
    """Which captioned images, and how they become squares of `image_px`."""

    source: Literal["shapes", "imagefolder", "huggingface"] = "shapes"
    """shapes draws its own scenes; imagefolder reads a directory; huggingface loads a data set."""
    path: str | None = None
    """Directory (imagefolder), or hub id, directory or parquet file (huggingface)."""
    count: Count = 20_000
    """Scenes in the data set; used by `shapes` only."""
    image_px: Annotated[Integer, Field(ge=8, le=4096)] = 64
    """Side of the square training picture in pixels."""
    split: str = "train"
    """Split of a Hugging Face data set."""
    image_column: str = "image"
    """Column with the picture; used by `huggingface`."""
    caption_column: str = "text"
    """Column with the caption; used by `huggingface` and by metadata files."""
    missing_caption: Literal["error", "empty"] = "error"
    """What a picture without a caption means: stop and list them, or train it unconditionally."""
    holdout: Whole = 0
    """Pictures kept out of training, for held-out figures; `shapes` draws its own."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut after the short side has been resized."""
    flip: bool = False
    """Mirror half of the pictures; wrong for captions that say left and right."""
    too_small: Literal["upscale", "error"] = "upscale"
    """Pictures smaller than `image_px`: enlarge them, or set them aside as bad."""
    max_bad_fraction: Fraction = 0.5
    """Stop with exit code 65 when more of the data set than this cannot be read."""
    pairs: Annotated[str, Field(min_length=1)] | None = None
    """Train on the pairs in this directory (`ldm reflow`, `ldm pairs images`), not on pictures."""
    workers: Whole = 0
    """Decoding processes; 0 decodes in the training process. Never changes the data order."""


class TrainConfig(Section):
    """Length, batch and numerics."""

    steps: Count = 1_000
    """Optimizer steps of the whole run."""
    batch_size: Count = 64
    """GLOBAL batch: samples per optimizer step over all ranks and accumulation steps."""
    accumulation: Count = 1
    """Micro-batches per optimizer step on each rank."""
    seed: Whole = 0
    """Every draw and the data order are functions of this number."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast precision of the network; weights, optimizer and EMA are always fp32. auto takes
    bf16 where the device multiplies it in hardware, and a resumed run keeps what it began with."""
    attention: Literal["auto", "sdpa", "xformers", "flex"] = "auto"
    """Attention kernel of the network; xformers and flex are proven on its shapes first."""
    cpu_kernels: Literal["auto", "plain", "tuned"] = "auto"
    """On a CPU: plain is torch's own way; auto takes faster kernels of equal precision where a
    probe finds them, and a resumed run keeps what it began with (docs/benchmarks.md)."""
    compile: bool = False
    """Compile the network with torch.compile (needs a C++ compiler on CPUs)."""
    max_bad_steps: Count = 3
    """Steps in a row with a non-finite gradient that are skipped before the run stops."""
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    """Decay of the weight average; 0 samples from the raw weights."""
    only: Literal["all", "decoder"] = "all"
    """What of a VAE is trained; decoder alone leaves the latents of a published one as they are."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class VaeRef(Section):
    """The frozen VAE of a diffusion run."""

    path: str | None = None
    """VAE run directory, checkpoint, diffusers directory or single file; null freezes a random one.
    """
    scaling_factor: Positive | None = None
    """Scale of the latents of a single file that holds a VAE alone, which does not say it: 0.18215
    of SD 1 and 2, 0.13025 of SDXL, 1.5305 of SD 3, 0.3611 of FLUX."""
    random: VaeModelConfig = VaeModelConfig(
        block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8
    )
    """Architecture of the random VAE when `path` is null; useful for trying things out only."""


class TextConfig(Section):
    """The frozen text encoder of a diffusion run."""

    path: str | None = None
    """Directory or Hugging Face id of a CLIP or T5 encoder; null freezes a random small one."""
    max_tokens: Count | None = None
    """Longest prompt in tokens; null means the encoder's own limit."""
    too_long: Literal["error", "truncate", "chunk"] = "error"
    """Captions over the limit: stop at the first, cut them all (the log names the first), or read
    them in chunks, whose states follow each other."""
    padding: Literal["masked", "attended"] = "masked"
    """Nothing attends to padding, or prompts are padded to max_tokens and all of it is attended, as
    the published Stable Diffusion models were trained."""
    layer: Annotated[Integer, Field(le=-1)] | None = None
    """Layer whose states are read: -1 is the last, -2 the one before; null is -1, and -2 for the
    CLIPs of a joint style."""
    final_norm: bool | None = None
    """Apply the encoder's final norm to them; null does, but for the CLIPs of a joint style."""
    lower_case: bool = False
    """Read captions in lower case and without outer spaces, as PixArt does."""
    style: Literal["single", "sdxl", "sd3", "flux"] = "single"
    """One encoder, or several: CLIPs side by side (sdxl), those followed by T5 (sd3), or T5 with
    the pooled vector of a CLIP (flux)."""
    further_paths: tuple[str, ...] = ()
    """Second and third encoder of a joint style; empty finds all of them in path."""
    t5_tokens: Count = 256
    """Tokens that the T5 of the styles sd3 and flux reads."""
    t5_width: Count = 4096
    """Width of the embedding of style sd3 when there is no T5."""
    classes: tuple[str, ...] | Literal["captions"] = ()
    """Labels instead of an encoder: class names in the order of their numbers, or those that the
    captions of the data set are. A prompt is then a name or a number."""
    zero_null: bool = False
    """The null embedding is zeros instead of the embedding of no words, as SDXL has it."""
    random_width: Count = 64
    """Width of the random encoder when `path` is null."""


class TimestepConfig(Section):
    """How training times are chosen."""

    distribution: Annotated[str, one_of(DISTRIBUTIONS)] = "uniform"
    """Law of t; edm is log-normal in sigma/alpha."""
    mean: Number | None = None
    """Mean of logit t (logit_normal) or of log sigma/alpha (edm); null is the law's own."""
    std: Positive | None = None
    """Standard deviation of the same."""
    scale: Annotated[Number, Field(ge=-1, le=1.75)] | None = None
    """How much denser mode is in the middle of t; null is its own."""
    placement: Annotated[str, one_of(PLACEMENTS)] = "stratified"
    """How times lie to each other, over all ranks: anyhow, one per equal slice of each global
    batch, or quasi-random over the run. Less noise, no bias."""
    importance: bool = False
    """Draw times of large losses more often and count them less: less noise, no bias."""
    shift: Positive = 1.0
    """Multiplies sigma/alpha in training and sampling; above 1 for larger pictures."""


class DiffusionConfig(Section):
    """The process, what the network predicts, and how errors are weighted."""

    process: Annotated[str, one_of(PROCESSES)] = "rectified_flow"
    """Noise process."""
    prediction: Annotated[str, one_of(PREDICTIONS)] = "flow"
    """What the network predicts."""
    data_std: Positive = 1.0
    """Standard deviation of the latents, for preconditioned predictions."""
    timesteps: TimestepConfig = TimestepConfig()
    """Distribution of training times."""
    weighting: Annotated[str, one_of(WEIGHTINGS)] = "none"
    """Loss weighting, whatever is predicted; none is the plain error of the prediction."""
    sigmoid_bias: Number | None = None
    """Log-SNR where weighting=sigmoid falls to one half; null is 2."""
    learned_variance: bool = False
    """Learn the variance of reverse steps as well, for sample.sampler=ddpm_learned."""
    caption_dropout: Fraction = 0.1
    """Share of samples trained with the null embedding; 0 makes guidance impossible."""
    coupling: Literal["independent", "optimal_transport"] = "independent"
    """Which noise goes with which sample: its own, or the nearest ones over the global batch."""
    coupling_condition_weight: Weight = math.inf
    """Optimal transport: price of noise from another caption, times their cosine distance. .inf:
    equal captions only, which leaves guidance exact; 0 skews the noise that a caption sees."""
    source: Literal["noise", "pictures"] = "noise"
    """What is at t = 1: noise, or the source pictures of data.pairs."""
    latent_noise: NotNegative = 0.0
    """Pairs only: s of the noise s sqrt(t (1 - t)) added between both ends (bridges)."""
    offset_noise: NotNegative = 0.0
    """Deviation of one more draw per channel in the noise: for very dark or bright pictures."""


class CacheConfig(Section):
    """Latents and text embeddings computed once."""

    enabled: bool = True
    """Train from the cache (built when missing) or encode every batch anew."""
    dir: Annotated[str, Field(min_length=1)] = "runs/cache"
    """Where caches live, each in a folder named by the hash of what it depends on."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Storage precision; fp32 makes cached and live training equal up to rounding."""
    shard_size: Count = 1_024
    """Samples per file; an interrupted build continues at the next file."""
    batch_size: Count = 64
    """Samples encoded at once."""


class SampleConfig(Section):
    """Sampling defaults: used by previews and stored in the checkpoint."""

    sampler: Annotated[str, one_of(SAMPLERS)] = "dpmpp_2m"
    """Solver."""
    steps: Annotated[Integer, Field(ge=1, le=1000)] = 20
    """Solver steps."""
    spacing: Annotated[str, one_of(SPACINGS)] = "uniform"
    """How the steps are spread over time."""
    guidance: Annotated[str, one_of(GUIDANCE_NAMES)] = "classifier_free"
    """Rule of guidance; autoguidance and classifier need a second model and are asked for when
    drawing."""
    cfg_scale: Annotated[Number, Field(ge=0, le=100)] = 4.0
    """Scale of guidance; 1 is off, 0 unconditional."""
    rescale: Fraction = 0.0
    """Guidance rescale (Lin et al. 2023)."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times between which guidance acts."""
    threshold: Fraction = 0.0
    """Dynamic thresholding (Imagen): percentile of |x0|, as a share; 0 is off, 0.995 theirs."""
    threshold_limit: Positive = 3.0
    """Range that the percentile is held against, in standard deviations of the latents."""
    apg_eta: Fraction = 0.0
    """Adaptive projected guidance: weight of the part that saturates."""
    apg_norm: Annotated[Number, Field(ge=0)] = 0.0
    """Adaptive projected guidance: largest norm of the change of a picture; 0 is no cap."""
    apg_momentum: Annotated[Number, Field(gt=-1, lt=1)] = -0.5
    """Adaptive projected guidance: momentum; below 0 it turns away from steps before."""


class PreviewConfig(Section):
    """Sample grids during training."""

    every_steps: Whole = 500
    """Optimizer steps between grids; 0 draws none."""
    prompts: tuple[str, ...] = ()
    """Prompts to draw; empty takes held-out captions."""
    count: Count = 16
    """Pictures per grid."""
    seed: Whole = 0
    """Seed of the first picture; the k-th has seed + k."""


class Experiment(Section):
    """What all stages share."""

    stage: str
    """vae, clip or diffusion: which command reads this file."""
    run: RunConfig
    """Run directory and its rhythm."""
    data: DataConfig = DataConfig()
    """Captioned images."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    train: TrainConfig = TrainConfig()
    """Length, batch, numerics."""


class VaeExperiment(Experiment):
    """`train_vae.py`."""

    stage: Literal["vae"] = "vae"
    """Which script reads this file."""
    model: VaeModelConfig = VaeModelConfig()
    """Architecture."""
    loss: VaeLossConfig = VaeLossConfig()
    """Objective."""
    gan: GanConfig = GanConfig()
    """Adversarial term."""
    equivariance: EquivarianceConfig = EquivarianceConfig()
    """Latents that turn and shrink with their pictures."""
    crop: DetailCropConfig = DetailCropConfig()
    """Training on detailed crops first."""
    preview: PreviewConfig = PreviewConfig()
    """Reconstruction grids."""


class ClipExperiment(Experiment):
    """`ldm train-clip`."""

    stage: Literal["clip"] = "clip"
    """Which command reads this file."""
    model: ClipModelConfig = ClipModelConfig()
    """Architecture."""


class DiffusionExperiment(Experiment):
    """`train_diffusion.py`."""

    stage: Literal["diffusion"] = "diffusion"
    """Which script reads this file."""
    vae: VaeRef = VaeRef()
    """Frozen VAE."""
    text: TextConfig = TextConfig()
    """Frozen text encoder."""
    model: Denoiser = DitConfig()
    """Denoiser."""
    lora: LoraConfig | None = None
    """Train adapters of a pretrained denoiser; null trains all of its weights."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Process and objective."""
    cache: CacheConfig = CacheConfig()
    """Latent and text cache."""
    sample: SampleConfig = SampleConfig()
    """Sampling defaults."""
    preview: PreviewConfig = PreviewConfig()
    """Sample grids."""


STAGES: dict[str, type[Experiment]] = {
    "vae": VaeExperiment,
    "clip": ClipExperiment,
    "diffusion": DiffusionExperiment,
}
