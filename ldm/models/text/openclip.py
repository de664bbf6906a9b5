"""OpenCLIP text towers: their weights in transformers' names and back, and the towers themselves.

A tower with a causal mask that pools at the end token is the same function as a CLIP of
transformers; `load_open_clip` makes it one, so that it is saved and exported like any other. Others
run as they are behind `OpenClipTower`.

R rows, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import ExitCode, LdmError, missing_package

LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""open_clip's name inside a block -> that of transformers."""
TOP = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
SOURCE = "open_clip:"
"""`open_clip:ViT-H-14/laion2b_s32b_b79k`, or a path to weights after the slash."""


def open_clip_to_transformers(
    state: Mapping[str, Tensor], layers: int, *, projection: bool, prefix: str = ""
) -> dict[str, Tensor]:
    """The weights of a text tower of open_clip under the names of transformers.

    Args:
        state: of open_clip, or of a whole checkpoint; other tensors are left alone.
        layers: of the model that is wanted. Stable Diffusion 2 has 23 of 24.
        projection: for CLIPTextModelWithProjection, else CLIPTextModel.
        prefix: before the names in `state`: "cond_stage_model.model." in checkpoints of Stable
            Diffusion 2, "conditioner.embedders.1.model." of SDXL, "text." of CustomTextCLIP.

    Returns:
        tensors named as the modules of transformers 5.6 and later name them.

    Raises:
        LdmError: IO, when a tensor is missing.
    """

    def take(name: str) -> Tensor:
        if prefix + name not in state:
            raise LdmError(
                f"the text tower lacks {prefix + name}",
                where="open_clip weights",
                fix="check the prefix, the number of layers, and the file",
                code=ExitCode.IO,
            )
        return state[prefix + name]

    wrapper = "text_model." if projection else ""
    out = {wrapper + ours: take(theirs) for theirs, ours in TOP.items()}
    for layer in range(layers):
        there, here = f"transformer.resblocks.{layer}", f"{wrapper}encoder.layers.{layer}"
        for part in ("weight", "bias"):
            for theirs, ours in LAYER.items():
                out[f"{here}.{ours}.{part}"] = take(f"{there}.{theirs}.{part}")
            stacked = take(f"{there}.attn.in_proj_{part}")
            for letter, tensor in zip("qkv", stacked.chunk(3), strict=True):
                out[f"{here}.self_attn.{letter}_proj.{part}"] = tensor.contiguous()
    if projection:
        linear = prefix + "text_projection.weight"  # some towers hold a layer, most a matrix
        weight = state[linear] if linear in state else take("text_projection").T
        out["text_projection.weight"] = weight.contiguous()
    return out


def transformers_to_open_clip(
    state: Mapping[str, Tensor], *, prefix: str = ""
) -> dict[str, Tensor]:
    """The inverse of `open_clip_to_transformers`, with `prefix` before every name.

    Args:
        state: of CLIPTextModel or CLIPTextModelWithProjection, with or without `text_model.`.
        prefix: as there.

    Raises:
        LdmError: IO, for a tensor that has no place in a tower of open_clip.
    """
    plain = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    plain.pop("embeddings.position_ids", None)  # a counter that older files hold
    out = {theirs: plain.pop(ours) for theirs, ours in TOP.items() if ours in plain}
    if "text_projection.weight" in plain:
        out["text_projection"] = plain.pop("text_projection.weight").T.contiguous()
    back = {ours: theirs for theirs, ours in LAYER.items()}
    while plain:
        name = next(iter(plain))
        _, layers, layer, rest = (*name.split(".", 3), "", "", "")[:4]
        inner, _, part = rest.rpartition(".")
        there, here = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        projections = [f"{here}.self_attn.{letter}_proj.{part}" for letter in "qkv"]
        if name in projections and plain.keys() >= set(projections):
            out[f"{there}.attn.in_proj_{part}"] = torch.cat([plain.pop(one) for one in projections])
        elif layers == "layers" and inner in back:
            out[f"{there}.{back[inner]}.{part}"] = plain.pop(name)
        else:
            raise LdmError(
                f"{name} has no place in a text tower of open_clip",
                where="CLIP weights",
                fix="give the whole state of a CLIP text model",
                code=ExitCode.IO,
            )
    return {prefix + name: tensor for name, tensor in out.items()}


def open_clip_text_config(model_config: Mapping[str, Any]) -> Any:
    """The `CLIPTextConfig` of a text tower, from open_clip's configuration of the whole model.

    Args:
        model_config: what `open_clip.get_model_config(name)` returns.

    Raises:
        LdmError: CONFIG for a tower that is no CLIP of transformers: without a causal mask, with
            layer scale, with a tokenizer of its own.
    """
    from transformers import CLIPTextConfig

    text = dict(model_config["text_cfg"])
    if other := sorted(key for key in text if key not in PLAIN and text[key] != USUAL.get(key)):
        raise LdmError(
            f"this text tower is no CLIP of transformers: it has {', '.join(other)}",
            where=SOURCE.rstrip(":"),
            fix="wrap the loaded model: HuggingFaceTextEncoder(OpenClipTower(model), tokenizer)",
            code=ExitCode.CONFIG,
        )
    width, norm = text.get("width", 512), text.get("norm_kwargs") or {}
    return CLIPTextConfig(
        vocab_size=text.get("vocab_size", 49_408),
        hidden_size=width,
        intermediate_size=int(width * text.get("mlp_ratio", 4.0)),
        num_hidden_layers=text.get("layers", 12),
        num_attention_heads=text.get("heads", 8),
        max_position_embeddings=text.get("context_length", 77),
        projection_dim=model_config["embed_dim"],
        hidden_act="quick_gelu" if model_config.get("quick_gelu") else "gelu",
        layer_norm_eps=norm.get("eps", 1e-5),
        bos_token_id=49_406,
        eos_token_id=49_407,
        pad_token_id=0,
    )


def load_open_clip(source: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The text tower of an open_clip model as a CLIPTextModelWithProjection, and its tokenizer.

    Args:
        source: `open_clip:NAME/TAG`, names of open_clip, whose weights are taken from the local
            cache and fetched only if they are not there; or `open_clip:NAME/PATH` with a
            safetensors file. The picture tower is never built.
        dtype: of the weights.

    Raises:
        LdmError: CONFIG for unknown names and for towers of another build, IO for weights that are
            not to be had or do not fit.
    """
    from transformers import CLIPTextModelWithProjection

    from ldm.models.text.files import fill, quiet
    from ldm.models.text.vocabulary import clip_tokenizer

    open_clip = _package()
    name, _, tag = source.removeprefix(SOURCE).partition("/")
    model_config = open_clip.get_model_config(name)
    if model_config is None:
        raise LdmError(
            f"open_clip knows no model {name!r}",
            where=source,
            fix="use a name of open_clip.list_models(), as in open_clip:ViT-H-14/laion2b_s32b_b79k",
            code=ExitCode.CONFIG,
        )
    path, quick = _weights(open_clip, name, tag, source)
    config = open_clip_text_config({"quick_gelu": quick, **model_config})
    with quiet(), torch.device("meta"):
        model = CLIPTextModelWithProjection(config)
    state = _text_tensors(path)
    names = open_clip_to_transformers(
        state, config.num_hidden_layers, projection=True, prefix=_prefix(state)
    )
    fill(model, {key: tensor.to(dtype) for key, tensor in names.items()}, str(path))
    return model, clip_tokenizer(pad="!", max_tokens=config.max_position_embeddings)


class OpenClipTower(nn.Module):
    """A text tower of open_clip with the surface that `HuggingFaceTextEncoder` uses.

    Args:
        model: open_clip's `CLIP`, or the `TextTransformer` of a `CustomTextCLIP` (`model.text`).
            The picture tower is not kept.

    Raises:
        LdmError: CONFIG for a tower that adds a class token (CoCa) or does not pool at the end
            token (SigLIP): its pooled vector would be another one.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        pool = getattr(model, "text_pool_type", None) or getattr(model, "pool_type", None)
        if pool not in ("argmax", "eos") or getattr(model, "cls_emb", None) is not None:
            raise LdmError(
                f"a text tower that pools {pool!r} is not supported",
                where="open_clip",
                fix="use a model of the CLIP family, such as ViT-H-14",
                code=ExitCode.CONFIG,
            )
        self.token_embedding, self.ln_final = model.token_embedding, model.ln_final
        self.positional_embedding = model.positional_embedding
        self.blocks = model.transformer.resblocks
        self.causal = model.attn_mask is not None
        self.text_projection = _linear(model.text_projection)
        block = self.blocks[0]
        # what HuggingFaceTextEncoder asks of a configuration
        self.config = SimpleNamespace(
            model_type="clip_text_model",
            hidden_size=int(self.positional_embedding.shape[1]),
            max_position_embeddings=int(self.positional_embedding.shape[0]),
            num_hidden_layers=len(self.blocks),
            num_attention_heads=block.attn.num_heads,
            hidden_act=type(block.mlp.gelu).__name__,
            layer_norm_eps=self.ln_final.eps,
        )

    @property
    def final_layer_norm(self) -> nn.Module:
        """The norm after the last layer."""
        norm: nn.Module = self.ln_final
        return norm

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
    ) -> Any:
        """States (R, L, D): `last_hidden_state` after the final norm, and `hidden_states`.

        Args:
            input_ids: (R, L).
            attention_mask: (R, L), 0 where padding is masked; None attends to everything before.
            output_hidden_states: also return the output of every layer; the first is the embedding.
        """
        length = input_ids.shape[1]
        x = self.token_embedding(input_ids) + self.positional_embedding[:length]
        allowed = torch.ones(length, length, dtype=torch.bool, device=x.device)
        allowed = allowed.tril() if self.causal else allowed
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None]  # (R, L, L)
            allowed = allowed.repeat_interleave(self.config.num_attention_heads, dim=0)
        mask = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(~allowed, float("-inf"))
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], attn_mask=mask))
        return SimpleNamespace(
            last_hidden_state=self.ln_final(states[-1]),
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def save_pretrained(self, directory: Path, safe_serialization: bool = True) -> None:
        """Refuses: transformers has no class for a tower that was not converted.

        Raises:
            LdmError: CONFIG.
        """
        raise LdmError(
            "a tower that runs in open_clip has no file layout that others read",
            where=str(directory),
            fix="load it as open_clip:NAME/TAG, which makes it a CLIP of transformers",
            code=ExitCode.CONFIG,
        )


def _package() -> Any:
    try:
        import open_clip
    except ImportError:
        raise missing_package("open_clip_torch", "openclip", "an open_clip source") from None
    return open_clip


def _weights(open_clip: Any, name: str, tag: str, source: str) -> tuple[Path, bool]:
    """The weights of a model, and whether they were trained with QuickGELU."""
    path = Path(tag).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise LdmError(
                f"{path.name} may hold a program; only safetensors are read",
                where=source,
                fix="give the safetensors file of the same model",
                code=ExitCode.IO,
            )
        return path, "quickgelu" in name
    facts = open_clip.get_pretrained_cfg(name, tag)
    if not facts:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise LdmError(
            f"{tag!r} is neither a file nor weights of {name}; open_clip knows: {known}",
            where=source,
            fix="use one of them, or a path to a safetensors file",
            code=ExitCode.CONFIG,
        )
    return _from_hub(str(facts.get("hf_hub") or "").rpartition("/")[0], source), bool(
        facts.get("quick_gelu") or "quickgelu" in name
    )


def _from_hub(repository: str, source: str) -> Path:
    from huggingface_hub import hf_hub_download

    reasons = ["these weights are not on the Hub"]
    for local in (True, False) if repository else ():
        try:
            return Path(hf_hub_download(repository, WEIGHTS, local_files_only=local))
        except (OSError, ValueError) as error:
            reasons.append(type(error).__name__)
    raise LdmError(
        f"the weights are not in the local Hugging Face cache, nor to be had ({reasons[-1]})",
        where=source,
        fix=f"run `hf download {repository or 'REPOSITORY'} {WEIGHTS}` while online, or give "
        "open_clip:NAME/PATH with a safetensors file",
        code=ExitCode.IO,
    )


def _text_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file but those of the picture tower."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if "visual." not in key}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LdmError(
            f"cannot be read ({error})",
            where=str(path),
            fix="fetch it again",
            code=ExitCode.IO,
        ) from error


def _prefix(state: Mapping[str, Tensor]) -> str:
    return "text." if "text.positional_embedding" in state else ""


def _linear(projection: Any) -> nn.Module | None:
    """open_clip's projection, a matrix (D, P) or a layer, as a layer."""
    if projection is None or isinstance(projection, nn.Module):
        return projection
    width, pooled = projection.shape
    layer = nn.Linear(width, pooled, bias=False)
    layer.weight = nn.Parameter(projection.detach().T.contiguous())
    return layer


WEIGHTS = "open_clip_model.safetensors"
PLAIN = {
    *("width", "heads", "layers", "context_length", "vocab_size", "mlp_ratio", "norm_kwargs"),
    *("eos_id", "pad_id", "output_tokens"),
}
"""Keys of text_cfg that any CLIP may have."""
USUAL = {"embed_cls": False, "no_causal_mask": False, "proj_type": "linear", "proj_bias": False}
USUAL |= {"pool_type": "argmax"}
"""What other keys may say."""
