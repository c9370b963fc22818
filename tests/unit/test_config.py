"""Configs: what is accepted, what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from cl import config
from cl.config import Config, apply_overrides, config_digest, dump_config, is_override, load_config, read_yaml
from cl.errors import ConfigError


class Optimizer(Config):
    lr: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)


class Data(Config):
    path: str
    weight: float = 1.0


class Run(Config):
    out: str = "runs/x"
    steps: int = 10
    precision: Literal["fp32", "bf16"] = "fp32"
    optimizer: Optimizer = Optimizer()
    corpora: list[Data] = []
    teacher: Optimizer | None = None


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped configs of two kinds."""
    for kind in ("run", "train", "recipes"):
        (tmp_path / kind).mkdir()
    monkeypatch.setattr(config, "configs_dir", lambda: tmp_path)
    return tmp_path


def refusal(*overrides: str, text: str | None = None, folder: Path | None = None) -> str:
    name = None
    if text is not None:
        assert folder is not None
        (folder / "given.yaml").write_text(text)
        name = str(folder / "given.yaml")
    with pytest.raises(ConfigError) as caught:
        load_config(Run, "run", name, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overrides_are_typed_by_the_model() -> None:
    run = load_config(
        Run,
        "run",
        None,
        ["optimizer.lr=1e-3", "steps=20", "optimizer.betas=[0.8, 0.9]", "corpora=[{path: a}]", "corpora.0.weight=2"],
    )
    assert run.optimizer.lr == 1e-3
    assert run.steps == 20
    assert run.optimizer.betas == (0.8, 0.9)
    assert run.corpora == [Data(path="a", weight=2.0)]


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1E5", 1e5), ("-2.5e-2", -2.5e-2), ("3", 3), ("'1e-3'", "1e-3")]
)
def test_exponents_are_numbers(text: str, value: object) -> None:
    assert apply_overrides({}, [f"x={text}"]) == {"x": value}


def test_an_override_makes_the_sections_on_its_way() -> None:
    assert apply_overrides({"teacher": None}, ["teacher.lr=0.5"]) == {"teacher": {"lr": 0.5}}


def test_extends_merges_below(shipped: Path) -> None:
    (shipped / "run" / "base.yaml").write_text("steps: 5\noptimizer: {lr: 0.5, betas: [0.1, 0.2]}\n")
    (shipped / "run" / "child.yaml").write_text("extends: base\noptimizer: {lr: 0.25}\n")
    run = load_config(Run, "run", "child", ["out=elsewhere"])
    assert (run.steps, run.optimizer.lr, run.optimizer.betas, run.out) == (5, 0.25, (0.1, 0.2), "elsewhere")


def test_a_config_that_extends_itself_is_refused(shipped: Path) -> None:
    (shipped / "run" / "a.yaml").write_text("extends: b\n")
    (shipped / "run" / "b.yaml").write_text("extends: a\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_config(Run, "run", "a")


def test_train_finds_recipes_too(shipped: Path) -> None:
    (shipped / "recipes" / "simcse.yaml").write_text("steps: 7\n")
    assert load_config(Run, "train", "simcse").steps == 7


def test_a_wrong_name_gets_the_nearest(shipped: Path) -> None:
    (shipped / "run" / "sample.yaml").write_text("steps: 7\n")
    with pytest.raises(ConfigError, match=r"'smaple'.*sample.*Did you mean 'sample'\?"):
        load_config(Run, "run", "smaple")
    with pytest.raises(ConfigError, match=r"nowhere/x\.yaml does not exist"):
        load_config(Run, "run", "nowhere/x.yaml")


def test_an_unknown_field_is_named_with_the_nearest_and_all_accepted() -> None:
    message = refusal("optimizer.lrr=0.1")
    for part in ("'optimizer.lrr'", "0.1", "Did you mean 'lr'?", "betas, lr"):
        assert part in message
    assert "Did you mean 'weight'?" in refusal("corpora=[{path: a, wieght: 2}]")
    assert "Did you mean 'betas'?" in refusal("teacher.beta=1")  # through an optional section


def test_an_ill_typed_field_is_named_with_its_value_and_what_is_accepted() -> None:
    message = refusal("steps=many")
    assert "'steps'" in message
    assert "'many'" in message
    assert "integer" in message
    assert "'fp32' or 'bf16'" in refusal("precision=fp8")
    assert "greater than 0" in refusal("optimizer.lr=-1")
    assert "'corpora.0.path' is required" in refusal("corpora=[{}]")
    assert "1 more field to mend" in refusal("steps=many", "precision=fp8")


def test_a_bad_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    assert "not valid YAML" in refusal(text="steps: [1", folder=tmp_path)
    assert "mapping of fields, not a list" in refusal(text="- 1", folder=tmp_path)
    assert "'steps' is given twice" in refusal(text="steps: 1\nsteps: 2\n", folder=tmp_path)


def test_yaml_cannot_make_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("out: !!python/object/apply:os.system ['touch /tmp/never']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        read_yaml(path)


def test_what_counts_as_an_override() -> None:
    assert is_override("a.b=1")
    assert is_override("corpora.0.path=x=y")
    assert not is_override("s3://bucket/k=v")
    assert not is_override("shards/00.tar")
    with pytest.raises(ConfigError, match="position from 0 to 0"):
        apply_overrides({"corpora": [{}]}, ["corpora.3.path=x"])


def test_dump_loads_again_and_the_digest_follows_every_value(tmp_path: Path) -> None:
    run = load_config(Run, "run", None, ["optimizer.lr=2e-5", "corpora=[{path: ünïcode}]"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(run), encoding="utf-8")
    again = load_config(Run, "run", str(path))
    assert again == run
    assert config_digest(again) == config_digest(run)
    assert config_digest(load_config(Run, "run", str(path), ["optimizer.lr=2.1e-5"])) != config_digest(run)


def test_a_loaded_config_does_not_change() -> None:
    run = load_config(Run, "run", None)
    with pytest.raises(ValueError, match="frozen"):
        run.steps = 3  # type: ignore[misc]
