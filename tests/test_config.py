"""Configuration, YAML and command line: one schema, complete help, refusals by name."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_ext import config as config_module
from megatron_ext.cli import dump_config, load_config, parse
from megatron_ext.config import Config, flag
from megatron_ext.presets import MODEL_PRESETS

SECTIONS = {f.name: f.default_factory for f in dataclasses.fields(Config)}
FIELDS = [(name, f.name) for name, kind in SECTIONS.items() for f in dataclasses.fields(kind)]


def field_texts() -> dict[str, str]:
    """The text under each field of the configuration's classes."""
    texts = {}
    for node in ast.walk(ast.parse(inspect.getsource(config_module))):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                texts[field.target.id] = " ".join(text.value.value.split())
    return texts


@pytest.fixture(scope="module")
def help_text() -> str:
    import contextlib
    import io

    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as ended:
        parse(["--help"])
    assert ended.value.code == 0
    return " ".join(shown.getvalue().split())


def test_every_flag_has_one_name_in_one_section() -> None:
    names = [name for _, name in FIELDS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_help_explains_every_flag(section: str, name: str, help_text: str) -> None:
    text = field_texts()[name]
    assert f" {flag(name)}" in help_text
    assert " ".join(text.split()[:4]) in help_text
    start = help_text.index(f"{section} options")
    assert re.search(f" {flag(name)}[ ,]", help_text[start:].split(" options ----", 2)[1])


@pytest.mark.parametrize(
    ("typo", "right"),
    [
        ("--micro-batchsize", "--micro-batch-size"),
        ("--tensor-parallel-size", "--tensor-model-parallel-size"),
        ("--warmup-iters", "--lr-warmup-iters"),
        ("--no-sequence-paralel", "--no-sequence-parallel"),
    ],
)
def test_a_typo_on_the_command_line_suggests_the_flag(
    typo: str, right: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse([typo, "2"])
    assert ended.value.code == 2
    assert right in capsys.readouterr().err


def test_a_wrong_type_on_the_command_line_names_the_flag(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["--hidden-size", "wide"])
    assert ended.value.code == 2
    assert "--hidden-size" in capsys.readouterr().err


def write(path: Path, tree: Any) -> str:
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return str(path)


def another_value(section: str, name: str) -> Any:
    """A value of the field's kind that is not its default."""
    value = getattr(SECTIONS[section](), name)
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 + 0.125
        case tuple():
            return ("a", "b")
        case None:
            return 2
    return value


INDEPENDENT = [
    ("model", "num_layers"), ("model", "vocab_size"), ("model", "attention_softcap"),
    ("model", "mlp_bias"), ("diffusion", "beta_is"), ("diffusion", "causal_prompt_attn"),
    ("noise", "p_prompt"), ("data", "data_path"), ("data", "drop_aligned_eos"),
    ("optimizer", "lr"), ("optimizer", "lr_warmup_iters"), ("optimizer", "adam_eps"),
    ("parallel", "context_parallel_size"), ("parallel", "use_distributed_optimizer"),
    ("precision", "bf16"), ("training", "seed"), ("training", "exit_duration_in_mins"),
    ("checkpoint", "async_save"), ("logging", "log_interval"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "name"), INDEPENDENT)
def test_yaml_and_flags_set_the_same_field(section: str, name: str, tmp_path: Path) -> None:
    value = another_value(section, name)
    recipe = write(
        tmp_path / "a.yaml", {section: {name: list(value) if isinstance(value, tuple) else value}}
    )
    if isinstance(value, bool):
        words = [flag(name) if value else flag("no_" + name)]
    else:
        words = [flag(name), *map(str, value if isinstance(value, tuple) else (value,))]
    from_file, from_flags = parse(["--config", recipe]), parse(words)
    assert getattr(getattr(from_file, section), name) == value
    assert from_file == from_flags == load_config(recipe)


def test_a_file_may_be_complete_only_with_its_flags(tmp_path: Path) -> None:
    recipe = write(tmp_path / "a.yaml", {"checkpoint": {"save_interval": 5}})
    with pytest.raises(ValueError, match="--save-interval is 5: give --save"):
        parse(["--config", recipe])
    assert parse(["--config", recipe, "--save", "runs/a"]).checkpoint.save_interval == 5


def test_flags_override_the_file_which_overrides_the_preset(tmp_path: Path) -> None:
    recipe = write(tmp_path / "a.yaml", {"model": {"num_layers": 6}, "optimizer": {"lr": 0.25}})
    config = parse(["--model-preset", "gidd-85m", "--config", recipe, "--lr", "0.5"])
    assert config.model.hidden_size == MODEL_PRESETS["gidd-85m"]["hidden_size"]
    assert (config.model.num_layers, config.optimizer.lr) == (6, 0.5)


def test_a_preset_can_stand_in_the_file(tmp_path: Path) -> None:
    recipe = write(tmp_path / "a.yaml", {"model_preset": "gidd-25m"})
    assert load_config(recipe) == parse(["--model-preset", "gidd-25m"])


def test_yaml_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    recipe = write(tmp_path / "a.yaml", "optimizer: {lr: 1e-3, adam_eps: 1e-12, clip_grad: 1}\n")
    optimizer = load_config(recipe).optimizer
    assert (optimizer.lr, optimizer.adam_eps, optimizer.clip_grad) == (1e-3, 1e-12, 1)
    assert load_config(recipe) == parse(["--lr", "1e-3", "--adam-eps", "1e-12", "--clip-grad", "1"])


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"modle": {}}, "unknown section 'modle'; did you mean 'model'"),
        ({"model": {"hiden_size": 8}}, "'model': unknown field 'hiden_size'; did you mean 'hid"),
        ({"model": {"hidden_size": "wide"}}, "'model': hidden_size is 'wide', expected int"),
        ({"model": {"hidden_size": 8.5}}, "hidden_size is 8.5, expected int"),
        ({"model": {"mlp_bias": 1}}, "mlp_bias is 1, expected bool"),
        ({"optimizer": {"lr": "fast"}}, "'optimizer': lr is 'fast', expected float"),
        ({"optimizer": {"lr": True}}, "lr is True, expected float"),
        ({"diffusion": {"objective": "gidd"}}, "objective is 'gidd', expected .*'masked'"),
        ({"data": {"data_path": "a"}}, "data_path is 'a', expected tuple"),
        ({"model": [1]}, "'model' must hold names and values"),
        ("model: [", "not valid YAML"),
        ("- model", "expected sections, found list"),
        ({"model_preset": "gidd-3b"}, "--model-preset is 'gidd-3b'; did you mean"),
        ({"model": {"seq_length": 0}}, "--seq-length is 0"),
    ],
)
def test_a_bad_file_is_refused_by_name(tree: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(tmp_path / "a.yaml", tree))


ENGINE = ["--transformer-impl", "transformer_engine", "--bf16"]
EMULATED = ["--fp8-format", "hybrid", "--fp8-emulate"]
REFUSALS = [
    (["--num-attention-heads", "3"], "--num-attention-heads is 3: it must divide --hidden-size"),
    (["--kv-channels", "15"], "--kv-channels is 15: rotary embedding needs an even"),
    (["--num-layers", "0"], "--num-layers is 0"),
    (["--attention-softcap", "-1"], "--attention-softcap is -1.0"),
    (["--mixing-scale", "1.5"], r"--mixing-scale is 1.5: .* Markov chain only for"),
    (["--min-log-snr", "9"], "--min-log-snr is 9.0: it must be below --max-log-snr"),
    (["--objective", "masked", "--mixing-shift", "1"], "--mixing-shift is 1.0: --objective mas"),
    (["--p-prompt", "1.5"], "--p-prompt is 1.5"),
    (["--max-empty-fraction", "1"], "--max-empty-fraction is 1.0"),
    (["--p-independent", "0.7", "--p-linear", "0.7"], "--p-linear is 0.7: together with --p-ind"),
    (["--num-workers", "-1"], "--num-workers is -1"),
    (["--mock-data", "--data-path", "a"], "--mock-data is True: remove --data-path"),
    (["--lr", "-1"], "--lr is -1.0"),
    (["--adam-beta2", "1"], "--adam-beta2 is 1.0"),
    (["--adam-eps", "0"], "--adam-eps is 0.0"),
    (["--sequence-parallel"], "--sequence-parallel is True: it needs --tensor-model-parallel"),
    (
        ["--num-virtual-stages-per-pipeline-rank", "2"],
        "--num-virtual-stages-per-pipeline-rank is 2: it needs --pipeline-model-parallel-size",
    ),
    (
        ["--overlap-param-gather", "--overlap-grad-reduce", "--no-use-distributed-optimizer"],
        "--overlap-param-gather is True: it needs --use-distributed-optimizer",
    ),
    (["--overlap-param-gather"], "--overlap-param-gather is True: it needs --overlap-grad"),
    (["--no-master-weights"], "--master-weights is False: only --bf16 runs"),
    (["--bf16", "--no-master-weights"], "--master-weights is False: .*--no-use-distributed"),
    (
        ["--bf16", "--no-use-distributed-optimizer"],
        "--use-distributed-optimizer is False: with --bf16 it keeps the master weights",
    ),
    (["--loss-chunk-size", "0"], "--loss-chunk-size is 0"),
    (["--train-iters", "0"], "--train-iters is 0"),
    (["--eval-interval", "-1"], "--eval-interval is -1"),
    (["--save-interval", "5"], "--save-interval is 5: give --save"),
    (["--ckpt-step", "5"], "--ckpt-step is 5: give --load"),
    (["--finetune"], "--finetune is True: give --load"),
    (["--keep-last", "-1"], "--keep-last is -1"),
    (["--log-interval", "0"], "--log-interval is 0"),
    (
        ["--tensor-model-parallel-size", "3"],
        "--tensor-model-parallel-size is 3: it must divide --num-attention-heads",
    ),
    (
        ["--tensor-model-parallel-size", "4", "--ffn-hidden-size", "30"],
        "--tensor-model-parallel-size is 4: it must divide --ffn-hidden-size",
    ),
    (
        ["--seq-length", "30", "--context-parallel-size", "4"],
        "--seq-length is 30: it must be a multiple of 4",
    ),
    (
        ["--seq-length", "20", "--context-parallel-size", "2", "--tensor-model-parallel-size",
         "4", "--sequence-parallel"],
        "--seq-length is 20: it must be a multiple of 8",
    ),
    (
        ["--num-layers", "5", "--pipeline-model-parallel-size", "2"],
        "--num-layers is 5: it must be a multiple of 2",
    ),
    (
        ["--pipeline-model-parallel-size", "2", "--no-untie-embeddings-and-output-weights"],
        "--untie-embeddings-and-output-weights is False: .* only",
    ),
    (["--objective", "ar", "--causal-prompt-attn"], "--causal-prompt-attn is True: --objective"),
    (
        ["--fp8-format", "hybrid"],
        "--fp8-format is 'hybrid': .*--transformer-impl transformer_engine, or --fp8-emulate",
    ),
    (["--fp8-emulate"], "--fp8-emulate is True: give --fp8-format"),
    (["--fp8-param-gather"], "--fp8-param-gather is True: give --fp8-format"),
    (["--first-last-layers-bf16"], "--first-last-layers-bf16 is True: give --fp8-format"),
    (["--transformer-impl", "transformer_engine"], "--transformer-impl is .*--bf16"),
    (
        [*ENGINE, "--fp8-format", "hybrid", "--fp8-emulate"],
        "--fp8-emulate is True: .*--transformer-impl local",
    ),
    ([*EMULATED, "--fp8-param-gather"], "--fp8-param-gather is True: .*leave it out"),
    (
        [*EMULATED, "--first-last-layers-bf16"],
        "--first-last-layers-bf16 is True: .*another --fp8-recipe",
    ),
    (
        [*EMULATED, "--fp8-recipe", "tensorwise", "--first-last-layers-bf16",
         "--num-layers-at-end-in-bf16", "5"],
        "--num-layers-at-end-in-bf16 is 5: a pipeline stage has 4 layers",
    ),
    ([*EMULATED, "--num-layers-at-start-in-bf16", "-1"], "--num-layers-at-start-in-bf16 is -1"),
    ([*EMULATED, "--fp8-margin", "-1"], "--fp8-margin is -1"),
    ([*EMULATED, "--fp8-amax-history-len", "0"], "--fp8-amax-history-len is 0"),
    (
        [*EMULATED, "--recompute-granularity", "full"],
        "--recompute-granularity is 'full': .*another --fp8-recipe",
    ),
    (
        [*EMULATED, "--hidden-size", "40"],
        "--hidden-size is 40: --fp8-recipe delayed needs multiples of 16",
    ),
    (
        [*EMULATED, "--fp8-recipe", "blockwise", "--ffn-hidden-size", "320"],
        "--ffn-hidden-size is 320: --fp8-recipe blockwise needs multiples of 128",
    ),
    (
        [*EMULATED, "--fp8-recipe", "mxfp8", "--hidden-size", "160",
         "--tensor-model-parallel-size", "2"],
        "--num-attention-heads is 4: .* multiples of 32 .* a matrix of 80",
    ),
    (
        [*EMULATED, "--seq-length", "4", "--micro-batch-size", "2"],
        "--micro-batch-size is 2: .* multiple of 16 tokens .* gives 8",
    ),
    (
        [*ENGINE, "--fp8-format", "e4m3", "--fp8-recipe", "mxfp8", "--fp8-param-gather"],
        "--fp8-param-gather is True: mxfp8",
    ),
    (
        [*ENGINE, "--fp8-format", "e4m3", "--fp8-param-gather", "--finetune", "--load", "a"],
        "--fp8-param-gather is True: --finetune",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[" ".join(r[0]) for r in REFUSALS])
def test_a_contradiction_is_refused_with_its_flag(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(arguments)


@pytest.mark.parametrize(
    ("arguments", "ranks", "message"),
    [
        (["--tensor-model-parallel-size", "2"], 3, "tp x pp x cp = 2 must divide .* ranks .3."),
        ([], 3, "--global-batch-size is 8: it must be a multiple of 24: --micro-batch-size"),
        (
            ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
            2,
            r"--num-virtual-stages-per-pipeline-rank is 2: .* micro-batches \(1\) .* multiple of",
        ),
    ],
)
def test_what_does_not_fit_the_ranks_is_refused(
    arguments: list[str], ranks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        parse(arguments).num_microbatches(ranks)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model-preset", "gidd-unif-10b", "--objective", "uniform", "--bf16"],
        ["--data-path", "0.7", "a", "0.3", "b", "--lr", "1e-5", "--adam-eps", "3e-13"],
        ["--attention-softcap", "None", "--residual-scale", "None", "--no-mlp-bias"],
    ],
)
def test_a_dumped_configuration_reads_back_equal(arguments: list[str], tmp_path: Path) -> None:
    config = parse(arguments)
    dump_config(config, tmp_path / "deep" / "config.yaml")
    assert load_config(tmp_path / "deep" / "config.yaml") == config
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["config.yaml"]


def test_the_configuration_is_frozen() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.training = None  # type: ignore[misc,assignment]
    for name in SECTIONS:
        section = getattr(config, name)
        field = dataclasses.fields(section)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(section, field, getattr(section, field))
