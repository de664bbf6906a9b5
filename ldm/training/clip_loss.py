"""What the small CLIP minimises: contrast with pictures, and recall of its own words.

B pairs of a batch, L tokens, P width of the shared space, V tokens in the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross-entropy of picking the caption of a picture and the picture of a caption.

    Source: Radford et al. 2021, figure 3; pairs with an equal caption are taken out of each other's
    negatives, for a picture cannot be told from another by a caption that both have.

    Args:
        logits: (B, B), agreement of picture i with caption j over the temperature.
        same: (B, B) bool, True where captions i and j are equal.

    Returns:
        A scalar; log(B) where nothing is known.
    """
    diagonal = torch.eye(len(same), dtype=torch.bool, device=same.device)
    logits = logits.masked_fill(same & ~diagonal, -torch.inf)
    target = torch.arange(len(same), device=same.device)
    to_caption = nn.functional.cross_entropy(logits, target)
    return (to_caption + nn.functional.cross_entropy(logits.T, target)) / 2


def word_agreement(cells: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """How well every word of a caption is found somewhere in a picture.

    Pooled contrast alone never looks at the last states of the words, only at the end token's, so
    they drift towards colour and lose shape and size; these states are what a denoiser attends to.

    Source: Yao et al. 2021 (FILIP, arXiv 2111.07783), equations 4 and 5, caption to picture.

    Args:
        cells: (B, C, P), one vector per region of a picture.
        words: (B, L, P), one vector per token of a caption.
        mask: (B, L) bool, True for tokens that count.

    Returns:
        (B, B) in [-1, 1]: picture i, caption j; the mean over words of the best cosine.
    """
    cells, words = nn.functional.normalize(cells, dim=-1), nn.functional.normalize(words, dim=-1)
    pictures, captions = len(cells), len(words)
    cosine = (cells.flatten(0, 1) @ words.flatten(0, 1).T).view(pictures, -1, captions, len(mask.T))
    best = cosine.amax(1) * mask  # (B, B, L)
    return best.sum(-1) / mask.sum(-1)


def recall_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of telling, from the state of each token, that token and the ones before it.

    Contrast keeps only what tells the pictures of a batch apart: colour and background do, so after
    a short training the states of "circle" and "square" are nearly equal, and a denoiser cannot
    draw what it cannot read. Recalling a few tokens keeps every word, bound to its adjectives.

    Source: as the captioning term of Yu et al. 2022 (CoCa, arXiv 2205.01917), looking backwards.

    Args:
        logits: (B, L, K, V); entry k of position i is a guess of token i - k.
        ids: (B, L) token ids.
        mask: (B, L) bool, True for tokens that count.

    Returns:
        A scalar: the mean over all guesses that exist.
    """
    guesses = []
    for back in range(min(logits.shape[1:3])):  # a caption may be shorter than the memory
        length = logits.shape[1] - back
        known = mask[:, back:]  # a real token has only real ones before it
        guesses.append((logits[:, back:, back][known], ids[:, :length][known]))
    return nn.functional.cross_entropy(
        torch.cat([guess for guess, _ in guesses]), torch.cat([truth for _, truth in guesses])
    )


def listing_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Divergence between a guess of which tokens a caption has and those it has.

    The pooled vector modulates a denoiser's every layer, so it should list all words as well.

    Args:
        logits: (B, V) from the pooled states.
        ids: (B, L) token ids.
        mask: (B, L) bool, True for tokens that count.

    Returns:
        A scalar, the mean Kullback-Leibler divergence; 0 when every list is right.
    """
    counts = torch.zeros_like(logits).scatter_add(1, ids, mask.to(logits))
    share = counts / counts.sum(1, keepdim=True)
    guess = logits.log_softmax(1)
    return nn.functional.kl_div(guess, share, reduction="batchmean")
