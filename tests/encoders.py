"""Small text encoders for tests: random weights, vocabularies of a few captions, no downloads."""

import json
import math
import string
from functools import cache

import torch

from ldm.models.text import HuggingFaceTextEncoder, random_text_encoder, train_bpe
from ldm.models.text.vocabulary import BEGIN, END, byte_symbols

CAPTIONS = (
    "a large red circle to the left of a small blue square on a green background",
    "two small yellow stars",
    "one star",
)
PADS = {"openai": "<|endoftext|>", "openclip": "!"}


def tiny_clip(**options):
    return random_text_encoder(CAPTIONS, width=32, layers=2, max_tokens=40, **options)


def t5_tokenizer():
    from transformers import T5Tokenizer

    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -12.0)]
    pieces += [(f"▁{word}", -math.log(len(words))) for word in words]
    pieces += [(letter, -14.0) for letter in string.ascii_lowercase + "<>/"]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def t5_model(width=32, seed=0):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return seeded(lambda: T5EncoderModel(config), seed)


def tiny_t5(**options):
    return HuggingFaceTextEncoder(t5_model(), t5_tokenizer(), **options)


@cache
def clip_tokenizer(pad="openai"):
    """CLIP's vocabulary with other merges: the order of its entries, "!" first and END last."""
    from transformers import CLIPTokenizer

    learned = train_bpe(CAPTIONS, vocab_size=5_000, max_tokens=77)
    pairs = json.loads(learned.backend_tokenizer.to_str())["model"]["merges"]
    merges, symbols = [tuple(pair) for pair in pairs], byte_symbols()
    entries = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    vocabulary = {entry: number for number, entry in enumerate([*entries, BEGIN, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=PADS[pad], model_max_length=77)


def clip_model(*, width=32, layers=3, act="quick_gelu", projection=None, seed=0):
    """A CLIP text tower for `clip_tokenizer`; `projection` is the width of the pooled."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    entries = len(clip_tokenizer())
    config = CLIPTextConfig(
        vocab_size=entries,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=projection or width,
        hidden_act=act,
        bos_token_id=entries - 2,
        eos_token_id=entries - 1,
        initializer_factor=2.0,  # tables of deviation 0.02 would leave words nearly alike
    )
    kind = CLIPTextModel if projection is None else CLIPTextModelWithProjection
    return seeded(lambda: kind(config), seed)


def seeded(make, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()
