"""The small model that stands for a large one, and the text that it is tried on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, islice

import torch
from torch import Tensor

from ltf.config.schema import Config
from ltf.data import corpus
from ltf.model.args import InitArgs, ModelArgs
from ltf.model.count import count_parameters

ROWS = 2
LONGEST = 128
LAYERS = 2


@dataclass(frozen=True)
class Text:
    """`tokens` (rows, length + 1) int64; `documents` (rows, length) where attention stays inside them."""

    tokens: Tensor
    documents: Tensor | None

    def to(self, device: torch.device) -> Text:
        documents = None if self.documents is None else self.documents.to(device)
        return Text(self.tokens.to(device), documents)


def small(args: ModelArgs) -> ModelArgs:
    """Two layers of each kind, narrow; head size, query groups, experts, top-k, norms and scores as they are.

    Weights are drawn wide enough (at least width^-1/2) for activations of order one: with near-uniform
    attention and near-even routers, faults in either would cancel.
    """
    groups = args.heads // args.kv_heads
    kv_heads = min(args.kv_heads, 2)
    width = min(args.width, 256)
    return replace(
        _shallow(args),
        vocab_size=min(args.vocab_size, 1024),
        width=width,
        heads=kv_heads * groups,
        kv_heads=kv_heads,
        ffn_width=None if args.ffn_width is None else min(args.ffn_width, 512),
        init=InitArgs(std=max(args.init.std, width**-0.5)),
        moe=None
        if (moe := _shallow(args).moe) is None
        else replace(moe, expert_width=min(moe.expert_width, 64)),
    )


def timed(args: ModelArgs, most: int) -> ModelArgs:
    """What speed is measured on, of at most `most` parameters.

    One or two layers of the model's own widths, with fewer experts if need be; the small model where that is
    too large.
    """
    own = replace(_shallow(args), vocab_size=min(args.vocab_size, 1024))
    if count_parameters(own).total > most:
        own = replace(_shallow(args, 1), vocab_size=own.vocab_size)
    while count_parameters(own).total > most:
        moe = own.moe
        if moe is None or moe.experts // 2 < 2 * max(own.top_k(layer) for layer in own.moe_layers):
            return small(args)
        own = replace(own, moe=replace(moe, experts=moe.experts // 2))
    return own


def texts(
    config: Config, args: ModelArgs, count: int, *, rows: int = ROWS, longest: int = LONGEST
) -> list[Text]:
    """`count` different batches of bytes of grammatical text, folded into the vocabulary.

    With `data.mask_boundaries` every row has two documents, cut in the middle.
    """
    length = min(config.data.seq_len, longest)
    need = count * rows * (length + 1)
    letters = chain.from_iterable(document.encode() for document in corpus.documents(config.run.seed))
    stream = torch.tensor(list(islice(letters, need)), dtype=torch.int64) % args.vocab_size
    documents = None
    if config.data.mask_boundaries:
        documents = (torch.arange(length) >= length // 2).long().expand(rows, -1)
    return [Text(tokens, documents) for tokens in stream.view(count, rows, length + 1)]


def _shallow(args: ModelArgs, layers: int = LAYERS) -> ModelArgs:
    moe = args.moe
    if moe is None:
        return replace(args, layers=min(args.layers, layers))
    dense = min(moe.dense_layers, 1)
    sparse = min(args.layers - moe.dense_layers, layers)
    top_k = moe.top_k if isinstance(moe.top_k, int) else moe.top_k[:sparse]
    return replace(args, layers=dense + sparse, moe=replace(moe, dense_layers=dense, top_k=top_k))
