"""Inputs on which known losses and loops are wrong, and Clew is not.

Each test first shows the wrong number, so that its input is known to expose the fault: of the system itself where it is
installed (open_clip, sentence-transformers), else of its formula written down in a few lines. Then it shows that Clew
equals the dense formula in float64. Gradients are taken as DDP leaves them, averaged over the workers.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator

import open_clip.loss
import pytest
import torch
import torch.distributed as dist
from open_clip.transformer import PatchDropout
from open_clip_train.train import train_one_epoch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss as TheirRankingLoss
from torch import Tensor, nn
from torch.nn.functional import normalize

from cl.engine.cache import CachedBatch
from cl.engine.collectives import Workers
from cl.engine.outcome import Outcome
from cl.engine.sweep import Tiling
from cl.engine.symmetric import symmetric_infonce
from cl.losses import ClipLoss, MultipleNegativesRankingLoss
from cl.objectives import ObjectiveConfig, build_objective
from cl.pairs import Pairs
from tests.distributed.pool import Pool, gradient

W, ROWS = 4, 3
CPU = torch.device("cpu")


def dense(image: Tensor, text: Tensor, scale: Tensor | float, excluded: Tensor | None = None) -> Tensor:
    """Radford et al. 2021, fig. 3, on whole matrices; `excluded` [N, N] are no candidates."""
    scores = scale * image @ text.T
    candidates = scores if excluded is None else scores.masked_fill(excluded, -torch.inf)
    return ((candidates.logsumexp(1) + candidates.logsumexp(0)) / 2 - scores.diagonal()).mean()


def leaves(rows: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (normalize(torch.randn(W * ROWS, 8, generator=generator).double(), dim=1)[rows] for _ in range(2))
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(11.0).double().requires_grad_()


def test_gradients_of_the_formula() -> None:
    """The dense formula is what open_clip computes in one process."""
    torch.testing.assert_close(dense(*leaves()), open_clip.loss.ClipLoss()(*leaves()), rtol=1e-12, atol=0)


# How others gather: loss of this worker's rows image, text [B, D] with the inverse temperature.


class _Gather(torch.autograd.Function):
    """All workers' rows; backward sums what all workers deposit on them, or averages it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor, average: bool) -> Tensor:
        ctx.average = average  # type: ignore[attr-defined]
        parts = [torch.empty_like(rows) for _ in range(W)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        dist.all_reduce(grad := grad.clone())
        grad = grad / W if ctx.average else grad  # type: ignore[attr-defined]
        return grad[ROWS * dist.get_rank() :][:ROWS], None


def _of_own_anchors(image: Tensor, text: Tensor, scale: Tensor, average: bool) -> Tensor:
    """The mean over this worker's rows and columns of the gathered matrix."""
    scores = scale * _Gather.apply(image, average) @ _Gather.apply(text, average).T
    own = slice(ROWS * dist.get_rank(), ROWS * (dist.get_rank() + 1))
    return ((scores.logsumexp(1) + scores.logsumexp(0)) / 2 - scores.diagonal())[own].mean()


def _own_slot(rows: Tensor) -> Tensor:
    """All workers' rows without gradient, and this worker's own put into its place."""
    parts = [torch.empty_like(rows) for _ in range(W)]
    dist.all_gather(parts, rows.detach().contiguous())
    parts[dist.get_rank()] = rows
    return torch.cat(parts)


def clew(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    loss = ClipLoss(rank=dist.get_rank(), world_size=W)(image, text, scale)
    assert isinstance(loss, Tensor)
    return loss


def open_clip_default(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return open_clip.loss.ClipLoss(rank=dist.get_rank(), world_size=W)(image, text, scale)


def open_clip_local(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return open_clip.loss.ClipLoss(local_loss=True, rank=dist.get_rank(), world_size=W)(image, text, scale)


def grad_cache(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """GradCache, FlagEmbedding: own slot only, the temperature multiplied into the embeddings before they travel."""
    return dense(_own_slot(scale * image), _own_slot(text), 1.0)


def contrastors(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return W * _of_own_anchors(image, text, scale, average=False)


def disco(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return _of_own_anchors(image, text, scale, average=True)


def inf_cl(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The gradient of the scale is summed over the workers in the ring's backward, and averaged by DDP after that."""

    def summed(grad: Tensor) -> Tensor:
        dist.all_reduce(grad := grad.clone())
        return grad

    own = scale.view(())
    own.register_hook(summed)
    return _of_own_anchors(image, text, own, average=False)


def _averaged(workers: Workers, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """On one worker: the gradient of its images and of the scale, as the average over the workers leaves them."""
    image, text, scale = leaves(slice(ROWS * workers.rank, ROWS * (workers.rank + 1)))
    loss(image, text, scale).backward()
    total = gradient(scale).clone()
    dist.all_reduce(total)
    return gradient(image) / W, total / W


def _over_workers(pool: Pool, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    answers = pool.run(_averaged, W, loss)
    return torch.cat([answer[0] for answer in answers]), answers[0][1]


def _exact() -> tuple[Tensor, Tensor]:
    image, text, scale = leaves()
    dense(image, text, scale).backward()
    return gradient(image), gradient(scale)


@pytest.mark.parametrize(
    ("loss", "encoder", "temperature"),
    [
        (open_clip_default, 1 / W, 1),
        (grad_cache, 1 / W, 1 / W),
        (contrastors, W, W),
        (disco, 1 / W, 1),
        (inf_cl, 1, W),
        (clew, 1, 1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_gathering_scales_gradients(
    pool: Pool, loss: Callable[..., Tensor], encoder: float, temperature: float
) -> None:
    """Others scale the gradients of encoders or temperature by W or 1/W; Clew equals the gradient of the formula."""
    found, exact = _over_workers(pool, loss), _exact()
    torch.testing.assert_close(found[0], encoder * exact[0], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found[1], temperature * exact[1], rtol=1e-10, atol=0)


def test_local_loss_without_gradients_has_another_direction(pool: Pool) -> None:
    """open_clip with `local_loss` alone misses terms: no factor mends it. Clew equals the formula's gradient."""
    exact = _exact()[0]
    theirs = _over_workers(pool, open_clip_local)[0]
    fitted = (theirs * exact).sum() / (exact * exact).sum() * exact
    assert (theirs - fitted).norm() / theirs.norm() > 0.1
    torch.testing.assert_close(_over_workers(pool, clew)[0], exact, rtol=1e-10, atol=1e-14)


# Accumulation in open_clip's own loop, one process.


class Towers(nn.Module):
    """Patches [B, 9, 5] and texts [B, 4]; remembers the random state before each call."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.drop = PatchDropout(dropout, exclude_first_token=False)
        self.image, self.text = nn.Linear(5, 6), nn.Linear(4, 6)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.states: list[Tensor] = []
        self.double()

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        self.states.append(torch.get_rng_state())
        return {
            "image_features": normalize(self.image(self.drop(images)).tanh().mean(1), dim=1),
            "text_features": normalize(self.text(texts), dim=1),
            "logit_scale": self.logit_scale.exp(),
        }


class Parts:
    """Two parts of a batch, as open_clip's loop takes a reader."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        shapes = [(5, 9, 5), (5, 4)] * 2
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        self.parts = [(drawn[0], drawn[1]), (drawn[2], drawn[3])]
        self.dataloader, self.num_batches, self.num_samples = self, 2, 10

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.parts)

    def set_epoch(self, epoch: int) -> None:
        pass


def _gradients(model: Towers) -> dict[str, Tensor]:
    return {name: gradient(parameter).clone() for name, parameter in model.named_parameters()}


def _open_clip_step(dropout: float, loss: nn.Module) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients after one step of `train_one_epoch` that accumulates two parts, and the random states."""
    model = Towers(dropout)
    args = Namespace(
        device="cpu", precision="fp32", accum_freq=2, distill=False, skip_scheduler=True, grad_clip_norm=None,
        horovod=False, log_every_n_steps=10, batch_size=5, world_size=1, rank=0, local_rank=0, wandb=False,
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    train_one_epoch(model, {"train": Parts()}, loss, 0, optimizer, None, None, None, args)
    return _gradients(model), model.states


def _whole(dropout: float, states: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of the formula on the whole batch, with the masks that these random states draw."""
    model = Towers(dropout)
    images, texts = [], []
    for (image, text), state in zip(Parts(), states, strict=True):
        torch.set_rng_state(state)
        out = model(image, text)
        images.append(out["image_features"])
        texts.append(out["text_features"])
    dense(torch.cat(images), torch.cat(texts), model.logit_scale.exp()).backward()
    return _gradients(model)


def _clew_step(dropout: float) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Gradients of Clew's accumulation, and the random states of its first pass."""
    model = Towers(dropout)

    def loss(views: dict[str, Tensor]) -> Outcome:
        value = ClipLoss()(views["image_features"], views["text_features"], model.logit_scale.exp())
        assert isinstance(value, Tensor)
        return Outcome(value)

    def encode(part: tuple[Tensor, Tensor], skip: object) -> dict[str, Tensor]:
        out = model(*part)
        return {name: out[name] for name in ("image_features", "text_features")}

    batch = CachedBatch(encode, Parts().parts, device=CPU)
    batch.evaluate(loss, [model.logit_scale])  # type: ignore[arg-type]
    batch.backward()
    return _gradients(model), model.states[:2]


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor], names: list[str]) -> float:
    difference = torch.cat([(found[name] - expected[name]).flatten() for name in names]).norm()
    return float(difference / torch.cat([expected[name].flatten() for name in names]).norm())


ENCODERS = ["image.weight", "image.bias", "text.weight", "text.bias"]


def test_accumulation_multiplies_the_gradient_of_the_temperature() -> None:
    """open_clip gives the logit scale accum_freq times its gradient; Clew's accumulation, and the drop-in that knows of
    it, equal the formula on the whole batch.
    """
    theirs, states = _open_clip_step(0.0, open_clip.loss.ClipLoss())
    whole = _whole(0.0, states[:2])
    assert _distance(theirs, whole, ENCODERS) < 1e-12
    torch.testing.assert_close(theirs["logit_scale"], 2 * whole["logit_scale"], rtol=1e-10, atol=0)
    for found, _ in (_clew_step(0.0), _open_clip_step(0.0, ClipLoss(accum_freq=2))):
        assert _distance(found, whole, [*ENCODERS, "logit_scale"]) < 1e-12


def test_accumulation_draws_other_masks_in_its_second_pass() -> None:
    """open_clip's gradient is that of no masks: neither of its first nor of its second pass. Clew equals the formula
    with the masks of its first pass, which its second repeats.
    """
    theirs, states = _open_clip_step(0.5, open_clip.loss.ClipLoss())
    assert _distance(theirs, _whole(0.5, states[:2]), ENCODERS) > 0.05
    assert _distance(theirs, _whole(0.5, states[2:]), ENCODERS) > 0.05
    ours, states = _clew_step(0.5)
    assert _distance(ours, _whole(0.5, states), [*ENCODERS, "logit_scale"]) < 1e-12


# Values.


def _alike() -> tuple[Tensor, Tensor]:
    """Pairs whose sides nearly agree, as after training, every second one a neighbour of the first; float32."""
    image, text, _ = leaves()
    image = image.detach().clone()
    image[1::2] = normalize(image[0::2] + 0.1 * image[1::2], dim=1)
    return image.float(), normalize(image + 0.1 * text, dim=1).detach().float()


def _ring(workers: Workers) -> tuple[Tensor, Tensor]:
    image, text = _alike()
    own = slice(ROWS * workers.rank, ROWS * (workers.rank + 1))
    image, text = image[own].requires_grad_(), text[own]
    layout, weight = workers.layout(ROWS, CPU), torch.ones(ROWS)
    scale = torch.tensor(100.0)
    loss, _, _ = symmetric_infonce(
        image, text, scale, layout=layout, weight=weight, exchange="ring", tiling=Tiling(2, 2)
    )
    loss.backward()
    return loss.detach(), gradient(image) / W


def test_sum_of_exponentials_overflows_at_a_scale_of_90(pool: Pool) -> None:
    """A ring that adds up exponentials without a maximum gives inf in float32; Clew's ring equals the formula."""
    image, text = _alike()
    for scale, finite in ((80.0, True), (90.0, False), (100.0, False)):
        blocks = [(scale * image @ block.T).exp().sum(1) for block in text.split(ROWS)]
        assert torch.stack(blocks).sum(0).log().mean().isfinite() == finite
    image, text = image.double().requires_grad_(), text.double()
    expected = dense(image, text, 100.0)
    expected.backward()
    answers = pool.run(_ring, W)
    # float32 rounds a logit of 100 by 1e-5.
    torch.testing.assert_close(answers[0][0], expected.detach().float(), rtol=0, atol=5e-5)
    found = torch.cat([answer[1] for answer in answers])
    torch.testing.assert_close(found, gradient(image).float(), rtol=0, atol=5e-5)


def _repeated() -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of which the first and the last, on different workers, hold the same picture and caption; content ids."""
    image, text, _ = leaves()
    image, text = image.detach().clone(), normalize(image + 0.3 * text, dim=1).detach()
    image[-1], text[-1] = image[0], text[0]
    content = torch.arange(W * ROWS)
    content[-1] = 0
    return image, text, content


def _without_own_content(workers: Workers) -> tuple[Tensor, Tensor]:
    image, text, content = _repeated()
    own = slice(ROWS * workers.rank, ROWS * (workers.rank + 1))
    views = {"image": image[own].requires_grad_(), "text": text[own]}
    objective = build_objective(ObjectiveConfig(name="infonce")).double()
    objective.load_state_dict({"temperature.log_scale": torch.tensor(11.0).double().log()})
    loss = objective(Pairs(views, content=content[own]), workers).loss
    loss.backward()
    return loss.detach(), gradient(views["image"]) / W


def test_repeated_content_is_pushed_apart(pool: Pool) -> None:
    """open_clip and sentence-transformers take a repeated pair for each other's negative, and a mask of equal
    embeddings misses it under dropout; Clew equals the formula without those two entries.
    """
    image, text, content = _repeated()
    same = (content[:, None] == content) & ~torch.eye(len(content), dtype=torch.bool)
    everything, expected = dense(image, text, 11.0), dense(image.requires_grad_(), text, 11.0, same)
    torch.testing.assert_close(open_clip.loss.ClipLoss()(image, text, torch.tensor(11.0)), everything)
    symmetric = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    ranking = TheirRankingLoss(nn.Identity(), 11.0, **symmetric)  # type: ignore[arg-type]
    features = [{"sentence_embedding": view} for view in (image, text)]
    torch.testing.assert_close(ranking(features, torch.empty(0)), everything)
    assert everything > expected + 0.05
    kept = nn.Dropout(0.1)(torch.stack([text[0], text[-1]]))
    assert not torch.equal(kept[0], kept[1])

    expected.backward()
    answers = pool.run(_without_own_content, W)
    torch.testing.assert_close(answers[0][0], expected.detach(), rtol=1e-10, atol=0)
    found = torch.cat([answer[1] for answer in answers])
    torch.testing.assert_close(found, gradient(image), rtol=1e-9, atol=1e-14)


class Linear(nn.Module):
    """A sentence encoder of 8 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8).double())

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["x"] * self.weight}


def _unequal(rank: int) -> list[dict[str, Tensor]]:
    """The last worker has no samples."""
    own = slice(ROWS * rank, ROWS * (rank + 1) if rank < W - 1 else ROWS * rank)
    return [{"x": side.detach()} for side in leaves(own)[:2]]


def _on_unequal_workers(workers: Workers, kind: type[nn.Module]) -> tuple[float, Tensor]:
    model = Linear()
    loss = kind(model)(_unequal(workers.rank), torch.empty(0))
    loss.backward()
    averaged = gradient(model.weight).clone()
    dist.all_reduce(averaged)
    return loss.item(), averaged / W


def test_worker_without_samples(pool: Pool) -> None:
    """A mean of means: sentence-transformers' value is NaN on the empty worker and gradients are 3/4 of the mean over
    all samples. Clew equals that mean, value and gradient, on every worker.
    """
    model = Linear()
    losses = []
    for rank in range(W - 1):
        query, document = (normalize(model(side)["sentence_embedding"], dim=1) for side in _unequal(rank))
        scores = 20 * query @ document.T
        losses.append(scores.logsumexp(1) - scores.diagonal())
    expected = torch.cat(losses).mean()
    expected.backward()

    theirs = pool.run(_on_unequal_workers, W, TheirRankingLoss)
    assert math.isnan(theirs[-1][0])
    torch.testing.assert_close(theirs[0][1], (W - 1) / W * gradient(model.weight), rtol=1e-10, atol=1e-14)
    ours = pool.run(_on_unequal_workers, W, MultipleNegativesRankingLoss)
    assert [value for value, _ in ours] == pytest.approx([expected.item()] * W, rel=1e-12)
    torch.testing.assert_close(ours[0][1], gradient(model.weight), rtol=1e-10, atol=1e-14)
