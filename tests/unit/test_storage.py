"""What killed writers leave is swept, and nothing else."""

from __future__ import annotations

from pathlib import Path

from cl import storage


def test_temporary_files_are_swept_here_or_everywhere_below(tmp_path: Path) -> None:
    inner = tmp_path / "nodes" / "rounds"
    inner.mkdir(parents=True)
    for folder in (tmp_path, inner):
        for name in (f"{storage.TEMPORARY}1-00000.arrow", "00000.arrow"):
            (folder / name).write_text("x")
    assert storage.sweep_temporary(str(tmp_path)) == 1
    assert len(list(inner.iterdir())) == 2
    assert storage.sweep_temporary(str(tmp_path), deep=True) == 1
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["00000.arrow"] * 2
    assert storage.sweep_temporary(str(tmp_path / "nowhere")) == 0
