"""Parsing errors become one line with the nearest name; TRL's names are understood."""

import argparse
from pathlib import Path

import pytest

lightning_cli = pytest.importorskip("lightning.pytorch.cli")

import lightning as L  # noqa: E402

from lightning_align.cli.parsing import explain, option_names  # noqa: E402
from lightning_align.cli.translate import translate_options  # noqa: E402
from lightning_align.errors import UserError  # noqa: E402


class ModelBase(L.LightningModule):
    def __init__(self, *, model: str, learning_rate: float = 1e-3) -> None:
        super().__init__()


class RankModule(ModelBase):
    def __init__(self, *, kl_coef: float = 0.1, max_new_tokens: int = 8, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]


class DataBase(L.LightningDataModule):
    def __init__(self, *, path: str, batch_size: int = 8) -> None:
        super().__init__()


class RankDataModule(DataBase):
    pass


BASES: dict[str, type] = {"model": ModelBase, "data": DataBase}
GOOD = ["--model", "RankModule", "--model.model", "m", "--data", "RankDataModule", "--data.path", "p"]


def parse(argv: list[str]) -> object:
    """Parse as ``fit`` does; UserError with the explanation."""
    parser = lightning_cli.LightningArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=lightning_cli.ActionConfigFile)
    parser.add_class_arguments(L.Trainer, "trainer", fail_untyped=False, instantiate=False)
    for section, base in BASES.items():
        parser.add_subclass_arguments(base, section, fail_untyped=False, required=True)
    try:
        return parser.parse_args(argv)
    except argparse.ArgumentError as error:
        options = [name for action in parser._actions for name in action.option_strings]
        raise UserError(explain(error, BASES, options)) from error


CASES = {
    "class": (
        ["--model", "RankModul", "--model.model", "m"],
        "unknown model class 'RankModul'; did you mean 'RankModule'?",
    ),
    "data class": (
        [*GOOD, "--data", "RankDataModul"],
        "unknown data class 'RankDataModul'; did you mean 'RankDataModule'?",
    ),
    "option": (
        [*GOOD, "--model.learning_rat", "1"],
        "unknown option model.learning_rat of RankModule; did you mean 'learning_rate'?",
    ),
    "own option": (
        [*GOOD, "--model.kl_coeff=1"],
        "unknown option model.kl_coeff of RankModule; did you mean 'kl_coef'?",
    ),
    "type": ([*GOOD, "--model.kl_coef", "lots"], "model.kl_coef is lots: give a number"),
    "missing": (["--model", "RankModule", "--data", "RankDataModule", "--data.path=p"], "RankModule needs model.model"),
    "trainer": (
        [*GOOD, "--trainer.max_step", "3"],
        "unknown option --trainer.max_step; did you mean '--trainer.max_steps'?",
    ),
    "section": ([*GOOD, "--modle.kl_coef", "3"], "unknown option --modle.kl_coef"),
    "config": (["--config", "/nowhere/none.yaml"], "file /nowhere/none.yaml does not exist (--config)"),
}


@pytest.mark.parametrize("case", CASES)
def test_command_line_errors_are_one_line(case: str) -> None:
    argv, message = CASES[case]
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


FILES = {
    "class": (
        "model: {class_path: RankModul, init_args: {model: m}}",
        "unknown model class 'RankModul'; did you mean 'RankModule'?",
    ),
    "option": (
        "model: {class_path: RankModule, init_args: {model: m, kl_coeff: 1}}",
        "unknown option model.kl_coeff of RankModule; did you mean 'kl_coef'?",
    ),
    "section": ("modle: {class_path: RankModule}", "unknown option modle"),
    "trainer": ("trainer: {max_step: 3}", "unknown option trainer.max_step; did you mean 'trainer.max_steps'?"),
    "yaml": ("model: [1", "the configuration is not valid YAML"),
}


@pytest.mark.parametrize("case", FILES)
def test_config_errors_are_one_line(case: str, tmp_path: Path) -> None:
    content, message = FILES[case]
    path = tmp_path / "c.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        parse(["--config", str(path)])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_options_of_a_class_include_those_of_its_bases() -> None:
    assert option_names(RankModule) == ["kl_coef", "max_new_tokens", "model", "learning_rate"]


def test_trl_names_are_translated_with_a_notice() -> None:
    argv = [*GOOD, "--model.response_length=5", "--per_device_train_batch_size", "4", "--model.kl_coef=0.2"]
    words, notices = translate_options(argv, BASES)
    assert words[-4:] == ["--model.max_new_tokens=5", "--data.batch_size", "4", "--model.kl_coef=0.2"]
    assert notices == [
        "model.response_length is called model.max_new_tokens here",
        "per_device_train_batch_size is called data.batch_size here",
    ]
    parsed = parse(words)
    assert parsed.model.init_args.max_new_tokens == 5  # type: ignore[attr-defined]
    assert parsed.data.init_args.batch_size == 4  # type: ignore[attr-defined]


def test_trl_names_in_a_config_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {class_path: RankModule, init_args: {model_name_or_path: m, init_kl_coef: 0.3}}\n"
        "data: {class_path: RankDataModule, init_args: {path: p}}\n"
        "gradient_accumulation_steps: 4\n"
    )
    words, notices = translate_options(["--config", str(path)], BASES)
    parsed = parse(words)
    assert parsed.model.init_args.model == "m"  # type: ignore[attr-defined]
    assert parsed.model.init_args.kl_coef == 0.3  # type: ignore[attr-defined]
    assert parsed.trainer.accumulate_grad_batches == 4  # type: ignore[attr-defined]
    assert len(notices) == 3


def test_files_without_trl_names_are_passed_on_untouched(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {class_path: RankModule, init_args: {model: m, kl_coef: 0.3}}\n")
    argv = ["--config", str(path), "--model.learning_rate=3"]
    assert translate_options(argv, BASES) == (argv, [])
