"""Gradient caching of compiled encoders, whose code draws random numbers by means of its own.

The two passes are compiled apart, without and with a graph, and still draw the same masks: gradients equal those of the
formula on one graph through the same compiled towers.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cl.engine.collectives import Workers
from cl.errors import ConfigError
from tests.distributed.cached_towers import Model, apart, cached, reference
from tests.distributed.pool import Pool

ROWS = (5, 2)  # chunks of two and of one
pytestmark = pytest.mark.slow


def compiled(checkpointed: bool) -> Model:
    model = Model(0.3, checkpointed)
    for tower in (model.image, model.text):
        tower.compile()
    return model


def _on_worker(workers: Workers, way: str, checkpointed: bool) -> tuple[float, float]:
    torch._dynamo.reset()
    whole, model = compiled(checkpointed), compiled(checkpointed)
    call: nn.Module = model
    encode: nn.Module = whole
    if way == "FSDP2":
        assert workers.group is not None
        mesh = DeviceMesh.from_group(workers.group, "cpu")
        for tower in (model.image, model.text):
            fully_shard(tower, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.log_scale})
    else:
        call = DistributedDataParallel(model, process_group=workers.group)
        if way == "compiled DDP":
            call, encode = torch.compile(call), torch.compile(whole)  # type: ignore[assignment]
    loss = cached(call, model, workers, ROWS[workers.rank])
    right = reference(whole, ROWS, encode=encode)
    return apart(model, whole), float((loss - right).abs())


@pytest.mark.parametrize(("way", "checkpointed"), [("DDP", True), ("compiled DDP", False), ("FSDP2", False)])
def test_masks_are_replayed(pool: Pool, way: str, checkpointed: bool) -> None:
    for errors in pool.run(_on_worker, 2, way, checkpointed, seconds=500):  # compiling takes its time
        assert max(errors) < 1e-12


def test_a_second_pass_that_is_no_longer_compiled_is_refused() -> None:
    """Past its limit torch.compile falls back to code that draws other numbers; that must not pass for a gradient."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1), pytest.raises(ConfigError, match="recompile_limit"):
        cached(model := compiled(False), model, Workers(), 4)
