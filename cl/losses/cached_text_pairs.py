"""The cached ranking loss of sentence-transformers, by its signature: any batch in the memory of a few samples.

See `cl.engine.cache` for the two passes. What is here is what a trainer around it needs: features of a batch cut into
parts, one synchronisation under DDP, and the autocast of the first pass in the second, which runs inside `backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cl.engine.cache import CachedBatch
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.errors import ConfigError
from cl.losses.citations import GRADIENT_CACHING
from cl.losses.text_pairs import Direction, Hardness, MultipleNegativesRankingLoss

Features = Mapping[str, Any]


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """The loss of `sentence_transformers.losses.CachedMultipleNegativesRankingLoss`, by its signature.

    Dropout draws its masks part by part, all columns of one, where the original goes column by column: of several parts
    the masks are others.

    Args:
        mini_batch_size: samples that are encoded at a time, column by column.
        mini_batch_num_tokens: instead of it, how many tokens of one column are encoded at a time; a longer text is
            a part of its own.
        show_progress_bar: accepted; the trainer shows progress.

    Raises:
        ConfigError: a setting that is unknown or out of range; when called: features that cannot be cut by sample, or
            a model under DDP with `static_graph=True`.
    """

    # sentence-transformers asks for this before it wraps a loss: its MatryoshkaLoss then wraps `calculate_loss`.
    uses_gradient_cache = True

    def __init__(
        self,
        model: nn.Module,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: Literal["joint", "per_direction"] = "joint",
        show_progress_bar: bool = False,
        hardness_mode: Hardness | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__(
            model,
            scale,
            similarity_fct,
            gather_across_devices,
            directions,
            partition_mode,
            hardness_mode,
            hardness_strength,
        )
        for name, value in [("mini_batch_size", mini_batch_size), ("mini_batch_num_tokens", mini_batch_num_tokens)]:
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be 1 or more, not {value}.")
        self.mini_batch_size, self.mini_batch_num_tokens = mini_batch_size, mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        names = [str(n) for n in range(len(columns))]
        spans = self._spans(columns)
        device = next(self.model.parameters()).device
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

        def encode(span: slice, skip: Collection[str]) -> Mapping[str, Tensor]:
            wanted = [name for name in names if name not in skip]
            synchronised = _synchronised(self.model, span is spans[-1] and names[-1] in wanted)
            with synchronised, torch.autocast(device.type, autocast[1], enabled=autocast[0]):
                return {name: self.model(_part(columns[int(name)], span))["sentence_embedding"] for name in wanted}

        if not torch.is_grad_enabled():
            encoded = [encode(span, ()) for span in spans]
            return self.calculate_loss([[part[name] for part in encoded] for name in encoded[0]], labels)
        batch = CachedBatch(encode, spans, device=device, groups=[[name] for name in names])
        loss = batch.evaluate(lambda views: self._outcome(views, labels)).loss
        # The caller's `loss.backward()` starts the second pass.
        loss = loss.requires_grad_()
        loss.register_hook(batch.backward)
        return loss

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings given by column in parts [n, D]; `with_backward` also takes their gradients."""
        loss = self._ranking().loss([torch.cat(parts) for parts in reps], Workers.current()).loss
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _outcome(self, views: Mapping[str, Tensor], labels: Tensor | None) -> Outcome:
        """The loss by way of `calculate_loss`, which a wrapper may have replaced, as a function of the embeddings."""
        leaves = [view.detach().requires_grad_() for view in views.values()]
        loss = self.calculate_loss([[leaf] for leaf in leaves], labels, with_backward=True)
        slopes = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        linear = torch.stack([(view * slope).sum() for view, slope in zip(views.values(), slopes, strict=True)]).sum()
        return Outcome(loss + (linear - linear.detach()))

    def _spans(self, columns: Sequence[Features]) -> list[slice]:
        """Consecutive samples that are encoded together."""
        rows = _rows(columns[0])
        if self.mini_batch_num_tokens is None:
            return [slice(i, i + self.mini_batch_size) for i in range(0, max(rows, 1), self.mini_batch_size)]
        if not all("attention_mask" in column for column in columns):
            raise ConfigError("mini_batch_num_tokens counts tokens by an attention_mask, which the features have not.")
        tokens = torch.stack([column["attention_mask"].sum(1) for column in columns]).tolist()  # [columns][B]
        starts = [0]
        for row in range(1, rows):
            if any(sum(column[starts[-1] : row + 1]) > self.mini_batch_num_tokens for column in tokens):
                starts.append(row)
        return [slice(start, end) for start, end in zip(starts, [*starts[1:], rows], strict=True)]

    @property
    def citation(self) -> str:
        return GRADIENT_CACHING

    def get_config_dict(self) -> dict[str, Any]:
        settings = super().get_config_dict()
        first = {name: settings[name] for name in ("scale", "similarity_fct")}
        cached = {"mini_batch_size": self.mini_batch_size, "mini_batch_num_tokens": self.mini_batch_num_tokens}
        return first | cached | settings  # in the original's order


def _rows(column: Features) -> int:
    """The number of samples in a tokenised column."""
    known = [column[name] for name in ("attention_mask", "input_ids") if name in column]
    return len(known[0] if known else next(value for value in column.values() if isinstance(value, Tensor)))


def _part(column: Features, span: slice) -> dict[str, Any]:
    """The features of some samples, without the columns that are padding in all of them."""
    rows = _rows(column)
    part: dict[str, Any] = {}
    for name, value in column.items():
        if not isinstance(value, Tensor) or value.ndim == 0 or name == "prompt_length":  # it is one for all samples
            part[name] = value
        elif len(value) == rows and name not in ("offsets", "cu_seq_lens_q"):
            # A copy: modules may write into their features, and the second pass has to see what the first saw.
            part[name] = value[span].clone()
        else:
            raise ConfigError(
                f"The cached loss cuts a batch by sample, but the features' {name} {list(value.shape)} is not in "
                f"order of the {rows} samples: use MultipleNegativesRankingLoss."
            )
    mask = part.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.any():
        end = int(mask.any(0).nonzero().max()) + 1
        tokens = [name for name, value in part.items() if isinstance(value, Tensor) and value.shape[:2] == mask.shape]
        part |= {name: part[name][:, :end] for name in tokens}
    return part


def _synchronised(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """DDP decides in a forward pass whether its backward pass synchronises: only that of the last part does."""
    wrapper = getattr(model, "_orig_mod", model)  # torch.compile around DDP
    if not isinstance(wrapper, DistributedDataParallel):
        return nullcontext()
    if wrapper.static_graph:
        raise ConfigError("The cached loss accumulates over parts, which DDP cannot do with static_graph=True.")
    return nullcontext() if last else wrapper.no_sync()
