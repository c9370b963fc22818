"""Dense float64 references of the registered objectives, written from the papers' formulas on whole matrices.

An objective is registered together with a reference in one of the modules here, one a family; each module holds a dict
REFERENCES by name. `test_walk.py` fails for an objective that has none.
"""

from __future__ import annotations

import importlib
import pkgutil

from tests.distributed.references.batch import Batch, Reference

REFERENCES: dict[str, Reference] = {}
for _module in pkgutil.iter_modules(__path__):
    if _module.name != "batch":
        _found: dict[str, Reference] = importlib.import_module(f"{__name__}.{_module.name}").REFERENCES
        assert not REFERENCES.keys() & _found.keys()
        REFERENCES.update(_found)

__all__ = ["REFERENCES", "Batch", "Reference"]
