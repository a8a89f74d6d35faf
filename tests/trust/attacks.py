"""Attacks of a worker that knows the model on masks that were published or used: each takes seconds.

X, ``[tokens, width]``, is what the first layer reads: rows of a dictionary that everybody has, the normalized embeddings. Sources: ArrowMatch (USENIX
Security 2025), arXiv 2602.11088 and 2505.18332 break such masks; the forms here are of our own.
"""

from __future__ import annotations

import torch


def nearest(rows: torch.Tensor, dictionary: torch.Tensor) -> torch.Tensor:
    """Of each row the entry that points the same way, ``[n]``."""
    wide = torch.nn.functional.normalize(rows.float(), dim=1)
    return (wide @ torch.nn.functional.normalize(dictionary.float(), dim=1).t()).argmax(dim=1)


def without(rows: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Rows less what they have of some directions, ``[count, width]``."""
    basis = torch.linalg.svd(directions.double(), full_matrices=False)[2]
    return (rows.double() - rows.double() @ basis.t() @ basis).float()


def from_rank_one(masked: torch.Tensor, dictionary: torch.Tensor, rounds: int = 4) -> torch.Tensor:
    """Tokens of X from X + a b^T X: all rows have the same one direction added, which the largest singular vector shows, and better with each token found."""
    direction = torch.linalg.svd(masked.double(), full_matrices=False)[2][:1]
    tokens = nearest(without(masked, direction), without(dictionary, direction))
    for _ in range(rounds):
        direction = torch.linalg.svd((masked - dictionary[tokens]).double(), full_matrices=False)[2][:1]
        tokens = nearest(without(masked, direction), without(dictionary, direction))
    return tokens


def from_stacked(first: torch.Tensor, second: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Q from Q + R and a R, given one row of Q, which the first token of every prompt is: it tells a, and a tells all."""
    noise = first[0].double() - known.double()
    factor = (second[0].double() @ noise) / (noise @ noise)
    return first.double() - second.double() / factor


def from_noise(masked: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Answer tokens from hidden states under noise, ``[repeats, tokens, width]``: their mean, through the head."""
    return (masked.double().mean(dim=0).float() @ head.t()).argmax(dim=1)


def from_basis(calls: torch.Tensor, pads: int, dictionary: torch.Tensor) -> torch.Tensor:
    """Tokens of the last call from rows under sums of so many fixed pads, ``[calls, tokens, width]``: what is large in all rows is the pads' space."""
    basis = torch.linalg.svd(calls.reshape(-1, calls.shape[-1]).double(), full_matrices=False)[2][:pads]
    return nearest(without(calls[-1], basis), without(dictionary, basis))
