"""What an experiment is: frozen, typed, documented, with unknown keys forbidden. Loads no torch.

One YAML file describes one experiment; `files.py` reads it and reports every mistake at once. The
rules that span several fields are in `rules.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from ldm.diffusion.names import (
    PREDICTION_NAMES,
    PROCESS_NAMES,
    SAMPLER_NAMES,
    SPACING_NAMES,
    TIMESTEP_NAMES,
    WEIGHTING_NAMES,
)


def _not_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, got a boolean")
    return value


def _one_of(names: tuple[str, ...]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return value

    return BeforeValidator(check)


Number = Annotated[float, BeforeValidator(_not_bool), Field(allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_not_bool), Field(ge=1)]
Whole = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
Positive = Annotated[Number, Field(gt=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]


class Section(BaseModel):
    """Base of every section: immutable, and no unknown key gets through."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


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
    image_px: Annotated[int, BeforeValidator(_not_bool), Field(ge=8, le=4096)] = 64
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
    workers: Whole = 0
    """Decoding processes; 0 decodes in the training process. Never changes the data order."""


class OptimConfig(Section):
    """AdamW and its schedule, a function of the optimizer step."""

    learning_rate: Positive = 1e-4
    """Peak rate, after warm-up."""
    warmup_steps: Whole = 100
    """Steps of linear warm-up; 0 disables it."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the decay from the peak to `final_fraction` of it at the last step."""
    final_fraction: Fraction = 0.0
    """Rate at the last step over the peak rate."""
    beta1: Annotated[Number, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    beta2: Annotated[Number, Field(ge=0, lt=1)] = 0.99
    """Decay of the second moment."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    """Decoupled decay; never applied to biases, norms and embeddings."""
    clip_norm: Positive = 1.0
    """Global gradient norm above which gradients are scaled down."""


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
    compile: bool = False
    """Compile the network with torch.compile (needs a C++ compiler on CPUs)."""
    max_bad_steps: Count = 3
    """Steps in a row with a non-finite gradient that are skipped before the run stops."""
    ema_decay: Annotated[Number, Field(ge=0, lt=1)] = 0.999
    """Decay of the weight average; 0 samples from the raw weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class VaeModelConfig(Section):
    """Architecture of the KL-VAE, in diffusers' words."""

    latent_channels: Count = 4
    """Channels of the latent."""
    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (128, 256, 512, 512)
    """Width per resolution level; each level after the first halves the picture."""
    layers_per_block: Count = 2
    """Residual blocks per level (the decoder has one more)."""
    norm_num_groups: Count = 32
    """Groups of every group norm; divides every width."""
    mid_block_add_attention: bool = True
    """Self-attention at the lowest resolution."""

    @property
    def downsample_factor(self) -> int:
        """Picture pixels per latent pixel."""
        return int(2 ** (len(self.block_out_channels) - 1))


class VaeLossConfig(Section):
    """What the VAE minimises: reconstruction + kl_weight * KL, both per pixel value."""

    reconstruction: Literal["l1", "l2", "l1+l2"] = "l1"
    """Distance between picture and reconstruction; the sum keeps small objects from being ignored
    early and edges sharp late."""
    kl_weight: Annotated[Number, Field(ge=0)] = 1e-6
    """Weight of the KL divergence, summed over the latent and divided by the pixel values."""


class DetailCropConfig(Section):
    """Train on small detailed crops first: convolutions learn as much from them, for less."""

    side_px: Count | None = None
    """Side of the crops; null trains on whole pictures throughout."""
    until: Fraction = 0.75
    """Share of the steps made on crops; the rest sees whole pictures, whose statistics differ."""
    candidates: Count = 4
    """Random crops per picture, of which the one with the largest variance is taken."""


class VaeRef(Section):
    """The frozen VAE of a diffusion run."""

    path: str | None = None
    """VAE run directory, checkpoint, or diffusers VAE directory; null freezes a random one."""
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
    too_long: Literal["error", "truncate"] = "error"
    """Captions over the limit: stop at the first, or cut them all (the log names the first)."""
    random_width: Count = 64
    """Width of the random encoder when `path` is null."""


class DitConfig(Section):
    """Diffusion transformer."""

    kind: Literal["dit"] = "dit"
    """Selects this architecture."""
    patch_size: Count = 2
    """Latent pixels per token side."""
    hidden_size: Count = 384
    """Width; a multiple of head_dim."""
    num_layers: Count = 12
    """Blocks."""
    head_dim: Count = 64
    """Width of one attention head."""
    mlp_ratio: Positive = 4.0
    """Feed-forward width over hidden_size."""
    local_conv: bool = False
    """A 3x3 convolution over the tokens in each block: small models learn much faster with it."""
    pooled: bool = True
    """Add the pooled text vector to the time embedding where the encoder has one."""


class UNetModelConfig(Section):
    """UNet with cross-attention, Stable Diffusion's layout."""

    kind: Literal["unet"] = "unet"
    """Selects this architecture."""
    block_out_channels: Annotated[tuple[Count, ...], Field(min_length=1)] = (320, 640, 1280, 1280)
    """Width per resolution level."""
    layers_per_block: Count = 2
    """Residual blocks per level."""
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """Which levels attend to the text."""
    heads: Count = 8
    """Attention heads; divides every attending width."""
    norm_num_groups: Count = 32
    """Groups of every group norm; divides every width."""


class TimestepConfig(Section):
    """How training times are chosen."""

    distribution: Annotated[str, _one_of(TIMESTEP_NAMES)] = "uniform"
    """Distribution of t in [0, 1]."""
    mean: Number = 0.0
    """Mean of the normal before the sigmoid; used by logit_normal."""
    std: Positive = 1.0
    """Standard deviation of that normal."""
    stratified: bool = True
    """One draw per equal slice of the distribution over the global batch: less noise, no bias."""
    shift: Positive = 1.0
    """Multiplies sigma/alpha in training and sampling; above 1 for larger pictures."""


class DiffusionConfig(Section):
    """The process, what the network predicts, and how errors are weighted."""

    process: Annotated[str, _one_of(PROCESS_NAMES)] = "rectified_flow"
    """Noise process."""
    prediction: Annotated[str, _one_of(PREDICTION_NAMES)] = "flow"
    """What the network predicts."""
    data_std: Positive = 1.0
    """Standard deviation of the latents, for preconditioned predictions."""
    timesteps: TimestepConfig = TimestepConfig()
    """Distribution of training times."""
    weighting: Annotated[str, _one_of(WEIGHTING_NAMES)] = "none"
    """Loss weighting; min_snr clamps the signal-to-noise ratio at 5."""
    caption_dropout: Fraction = 0.1
    """Share of samples trained with the null embedding; 0 makes guidance impossible."""


def _kind(value: Any) -> Any:
    """The architecture that a `model` section means; dit when it does not say."""
    return value.get("kind", "dit") if isinstance(value, dict) else getattr(value, "kind", None)


Denoiser = Annotated[
    Annotated[DitConfig, Tag("dit")] | Annotated[UNetModelConfig, Tag("unet")],
    Discriminator(_kind),
]


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

    sampler: Annotated[str, _one_of(SAMPLER_NAMES)] = "dpmpp_2m"
    """Solver."""
    steps: Annotated[int, BeforeValidator(_not_bool), Field(ge=1, le=1000)] = 20
    """Solver steps."""
    spacing: Annotated[str, _one_of(SPACING_NAMES)] = "uniform"
    """How the steps are spread over time."""
    cfg_scale: Annotated[Number, Field(ge=0, le=100)] = 4.0
    """Classifier-free guidance; 1 is off, 0 unconditional."""
    rescale: Fraction = 0.0
    """Guidance rescale (Lin et al. 2023)."""
    interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Times between which guidance acts."""


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


class ClipModelConfig(Section):
    """The small CLIP of `ldm train-clip`."""

    width: Count = 128
    """Width of both towers; a multiple of 32."""
    layers: Count = 2
    """Layers of the text tower."""
    vision_layers: Count = 3
    """Layers of the picture tower."""
    patch_px: Count = 8
    """Patch side of the picture tower."""
    vocab_size: Annotated[int, BeforeValidator(_not_bool), Field(ge=300)] = 1_000
    """Most tokens the tokenizer may have; at least 256 bytes twice over are always there."""
    max_tokens: Annotated[int, BeforeValidator(_not_bool), Field(ge=8)] = 77
    """Longest caption in tokens, with the two markers."""


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
