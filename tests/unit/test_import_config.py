"""`clew import-config`: open_clip's flags and sentence-transformers' arguments, read by the originals' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from open_clip_train.params import parse_args
from sentence_transformers import SentenceTransformerTrainingArguments

from cl.cli import main
from cl.config import parse_config
from cl.errors import ConfigError
from cl.importing.open_clip import TRANSLATED, WITHOUT, import_open_clip
from cl.importing.sentence_transformers import import_sentence_transformers
from cl.training.config import TrainConfig


def resolved(config: dict[str, Any]) -> TrainConfig:
    return parse_config(TrainConfig, config, "test")


FLAGS = [
    *("--model", "ViT-B-16", "--batch-size", "100", "--accum-freq", "3", "--epochs", "7", "--lr", "0.001"),
    *("--wd", "0.1", "--warmup", "50", "--lr-scheduler", "const", "--precision", "amp_bf16", "--seed", "5"),
    *("--grad-clip-norm", "0.5", "--workers", "6", "--siglip", "--torchcompile", "--lock-text", "--name", "try"),
    *("--logs", "runs", "--force-patch-dropout", "0.25", "--local-loss", "--val-data", "val.tar"),
]


def test_flags_of_open_clip_become_fields() -> None:
    found = import_open_clip(FLAGS, gpus=2)
    cfg = resolved(found.config)
    assert (cfg.out, cfg.seed, cfg.epochs, cfg.precision, cfg.clip_norm) == ("runs/try", 5, 7, "bf16", 0.5)
    assert (cfg.batch_size, cfg.micro_batch, cfg.workers.count) == (600, 100, 2)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.optimizer.betas) == (0.001, 0.1, (0.9, 0.98))
    assert (cfg.schedule.kind, cfg.schedule.warmup_steps, cfg.loader.threads) == ("constant", 50, 6)
    assert cfg.objective.name == "siglip"
    assert cfg.model.embed_dim == 512
    assert found.config["model"]["towers"]["image"]["patch_dropout"] == 0.25
    assert set(cfg.locked) == {"text"}
    assert cfg.parallel.compile
    assert [note.setting for note in found.notes] == ["--accum-freq 3", "--val-data val.tar", "--local-loss"]


def test_the_defaults_of_open_clip_are_its_own() -> None:
    found = import_open_clip([])
    cfg = resolved(found.config)
    assert (cfg.optimizer.betas, cfg.optimizer.eps) == ((0.9, 0.999), 1e-8), "of a model that is no ViT"
    assert (cfg.batch_size, cfg.micro_batch, cfg.epochs, cfg.schedule.warmup_steps) == (64, None, 32, 10000)
    assert (cfg.objective.name, cfg.clip_norm, cfg.optimizer.lr) == ("infonce", None, 5e-4)
    assert [note.setting for note in found.notes] == ["--precision amp"]


def test_what_is_named_as_left_out_are_flags_of_open_clip() -> None:
    flags = set(vars(parse_args([])))
    assert set(WITHOUT) | TRANSLATED <= flags
    assert not set(WITHOUT) & TRANSLATED


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--model", "ViT-B-33"], "no model 'ViT-B-33'. Did you mean 'ViT-B-32'"),
        (["--modle", "x"], "open_clip does not take these flags: unrecognized arguments: --modle x"),
        (["--epochs", "many"], "argument --epochs: invalid int value"),
    ],
)
def test_flags_that_open_clip_refuses(flags: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace(".", r"\.")):
        import_open_clip(flags)


def sentence_model(folder: Path, pooling: dict[str, Any], *more: str) -> Path:
    """What sentence-transformers writes beside the weights."""
    kinds = ["Transformer", "Pooling", *more]
    modules = [
        {
            "idx": n,
            "name": str(n),
            "path": "" if n == 0 else f"{n}_{kind}",
            "type": f"sentence_transformers.models.{kind}",
        }
        for n, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir(parents=True)
    for name, value in {
        "modules.json": modules,
        "config.json": {"model_type": "bert", "hidden_size": 48},
        "sentence_bert_config.json": {"max_seq_length": 96},
        "1_Pooling/config.json": pooling,
    }.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def test_arguments_of_sentence_transformers_become_fields(tmp_path: Path) -> None:
    given = SentenceTransformerTrainingArguments(
        output_dir="runs/st",
        per_device_train_batch_size=64,
        num_train_epochs=2,
        learning_rate=2e-5,
        weight_decay=0.01,
        warmup_steps=10,
        lr_scheduler_type="constant_with_warmup",
        gradient_accumulation_steps=4,
        max_grad_norm=0.7,
        dataloader_num_workers=3,
        batch_sampler="no_duplicates",
        save_steps=250,
        save_total_limit=4,
        bf16=True,
        use_cpu=True,
    )
    folder = sentence_model(tmp_path / "model", {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    arguments = json.loads(given.to_json_string())
    found = import_sentence_transformers(
        arguments, str(folder), "CachedMultipleNegativesRankingLoss", mini_batch_size=16, gpus=2
    )
    cfg = resolved(found.config)
    assert (cfg.out, cfg.epochs, cfg.batch_size, cfg.micro_batch) == ("runs/st", 2, 128, 16)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.optimizer.betas) == (2e-5, 0.01, (0.9, 0.999))
    assert (cfg.schedule.kind, cfg.schedule.warmup_steps, cfg.clip_norm, cfg.precision) == ("constant", 10, 0.7, "bf16")
    assert (cfg.checkpoint.every_steps, cfg.checkpoint.keep_last, cfg.loader.threads) == (250, 4, 3)
    objective = cfg.objective.model_dump()
    assert (objective["name"], objective["temperature"], objective["direction"]) == ("infonce", 0.05, "forward")
    assert objective["learn_temperature"] is False
    tower = found.config["model"]["towers"]["text"]
    assert (tower["pooling"], tower["max_tokens"], tower["head"]) == ("cls", 96, "none")
    assert cfg.model.embed_dim == 48
    said = {note.setting.split()[0] for note in found.notes}
    assert said == {"batch_sampler", "gradient_accumulation_steps", "use_cpu", "dataloader_pin_memory"}


def test_what_has_no_equivalent_is_said(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model", {"pooling_mode_max_tokens": True, "pooling_mode": "max"}, "Dense")
    found = import_sentence_transformers({"lr_scheduler_type": "polynomial", "num_train_epochs": 1.5}, str(folder))
    assert resolved(found.config).epochs == 2
    said = " / ".join(note.setting for note in found.notes)
    assert said == "num_train_epochs 1.5 / pooling max / module Dense / lr_scheduler_type polynomial"


def test_losses_folders_and_arguments_that_are_not_there(tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "model", {"pooling_mode_mean_tokens": True})
    with pytest.raises(ConfigError, match="The loss 'TripletLoss' has no translation; those that have one are Multi"):
        import_sentence_transformers({}, str(folder), "TripletLoss")
    with pytest.raises(ConfigError, match="nothing holds no transformer"):
        import_sentence_transformers({}, str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="arguments have no 'learning_rat'"):
        import_sentence_transformers({"learning_rat": 1}, str(folder))


def test_the_command_prints_yaml_that_loads_with_its_notes_as_comments(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["import-config", "open_clip", "--gpus", "4", "--", "--model", "ViT-B-32", "--val-data", "x"])
    out = capsys.readouterr().out
    assert "# --val-data x: clew eval measures" in out
    assert resolved(yaml.safe_load(out)).batch_size == 256
    folder = sentence_model(tmp_path / "model", {"pooling_mode_mean_tokens": True})
    (tmp_path / "args.json").write_text(json.dumps({"per_device_train_batch_size": 32}))
    words = ["import-config", "sentence-transformers", str(tmp_path / "args.json"), "--model", str(folder), "--json"]
    main([*words, "--loss", "MultipleNegativesSymmetricRankingLoss"])
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["batch_size"] == 32
    assert "direction" not in found["config"]["objective"]
