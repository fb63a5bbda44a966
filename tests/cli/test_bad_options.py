"""Options that users get wrong: the line names the option, what is wrong and the nearest right one."""

from typing import Any

import pytest
import torch

UNUSABLE: dict[str, tuple[str, list[str], str]] = {
    "model class": ("sft", ["--model=SFTModul"], "unknown model class 'SFTModul'; did you mean 'SFTModule'?"),
    "data class": ("sft", ["--data=SFTDatModule"], "unknown data class 'SFTDatModule'; did you mean 'SFTDataModule'?"),
    "option of the model": (
        "sft",
        ["--model.learning_rat=1"],
        "unknown option model.learning_rat of SFTModule; did you mean 'learning_rate'?",
    ),
    "option of the data": (
        "sft",
        ["--data.batchsize=1"],
        "unknown option data.batchsize of SFTDataModule; did you mean 'batch_size'?",
    ),
    "option of the trainer": (
        "sft",
        ["--trainer.max_step=1"],
        "unknown option --trainer.max_step=1; did you mean '--trainer.max_steps'?",
    ),
    "option without its section": (
        "sft",
        ["--batch_size=1"],
        "unknown option --batch_size=1; did you mean '--data.batch_size'?",
    ),
    "trainer option without its section": (
        "sft",
        ["--max_steps=1"],
        "unknown option --max_steps=1; did you mean '--trainer.max_steps'?",
    ),
    "stray word": ("sft", ["sft"], "unknown option sft"),
    "value missing": ("sft", ["--run.root"], "argument --run.root: expected one argument"),
    "precision": (
        "sft",
        ["--trainer.precision=fp8"],
        "trainer.precision is fp8: give one of 64, 32, 16, transformer-engine, transformer-engine-float16, 16-true, "
        "16-mixed, bf16-true, bf16-mixed, 32-true, 64-true, bf16 or null",
    ),
    "choice": (
        "sft",
        ["--model.dtype=bfloat61"],
        "model.dtype is bfloat61: give one of float32, bfloat16, float16, auto; did you mean 'bfloat16'?",
    ),
    "number": ("sft", ["--data.batch_size=many"], "data.batch_size is many: give a whole number"),
    "fraction": ("sft", ["--data.batch_size=1.5"], "data.batch_size is 1.5: give a whole number"),
    "number or null": (
        "sft",
        ["--data.eval_batch_size=many"],
        "data.eval_batch_size is many: give a whole number or null",
    ),
    "truth value": ("sft", ["--data.shuffle=perhaps"], "data.shuffle is perhaps: give true or false"),
    "objective": (
        "reward",
        ["--model.objective=plackett"],
        "model.objective is plackett: give one of bradley_terry, plackett_luce, squared_error, huber; did you "
        "mean 'plackett_luce'?",
    ),
    "smoothing of a ranking": (
        "reward",
        ["--model.objective=plackett_luce", "--model.label_smoothing=0.1"],
        "model.label_smoothing is 0.1: give 0 with objective plackett_luce",
    ),
    "centring of scores": (
        "reward",
        ["--model.objective=huber", "--model.center_rewards_coefficient=0.1"],
        "model.center_rewards_coefficient is 0.1: give 0 with objective huber",
    ),
    "ties of a ranking": (
        "reward",
        ["--model.objective=plackett_luce", "--data.ties=davidson"],
        "data.ties is davidson, which RewardModule cannot learn here: give drop, soft",
    ),
    "kind of records": (
        "reward",
        ["--model.objective=huber", "--data.kind=ranked"],
        "data.kind is ranked, but the model learns from scored records: leave data.kind out",
    ),
    "config that is none": ("sft", ["--config=none.yaml"], "none.yaml does not exist (--config)"),
    "wrong data class": (
        "sft",
        ["--data=PromptDataModule"],
        "SFTModule learns from text or sft records, but --data is PromptDataModule: give SFTDataModule or "
        "TextDataModule",
    ),
    "wrong model class": (
        "sft",
        ["--model.reward=playground", "--model=PPOModule"],  # the class may stand after its options
        "PPOModule learns from prompt records, but --data is SFTDataModule: give PromptDataModule",
    ),
    "GPUs on a machine without": (
        "sft",
        ["--trainer.accelerator=gpu", "--trainer.devices=2"],
        "trainer: No supported gpu backend found!",
    ),
    "Lightning's clipping": (
        "sft",
        ["--trainer.gradient_clip_val=1.0"],
        "trainer.gradient_clip_val is not used here: set model.max_grad_norm instead",
    ),
    "steps of an online method": (
        "ppo",
        ["--trainer.max_steps=3"],
        "trainer.max_steps is for offline methods: set model.iterations instead",
    ),
    "completion longer than the context": (
        "ppo",
        ["--model.max_new_tokens=96"],
        "model.max_new_tokens is 96, but runs/sft has 96 positions: no prompt fits before such a completion",
    ),
    "more minibatches than prompts": (
        "ppo",
        ["--model.num_mini_batches=9"],
        "model.num_mini_batches is 9: give at most 8, one a prompt",
    ),
    "validation beyond the epoch": (
        "sft",
        ["--trainer.val_check_interval=99", "--trainer.check_val_every_n_epoch=1"],
        "trainer.val_check_interval is 99, but an epoch has 8 batches: lower it, or count on over "
        "epochs with trainer.check_val_every_n_epoch null",
    ),
    "W&B mode": ("sft", ["--run.wandb=of"], "run.wandb is of: give one of offline, online, disabled or null"),
    "seed": ("sft", ["--seed_everything=-1"], "seed_everything is -1: give a whole number from 0 to 4294967295"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_options(desk: Any, case: str) -> None:
    if "GPU" in case and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    config, words, line = UNUSABLE[case]
    said = desk.refused(*desk.fit_words(config), "--run.name=new", *words)
    assert said.replace(f"file {desk.root}/", "") == line


SHARE = "a share from 0 up to (not including) 1"
RANGES: dict[str, dict[str, str]] = {
    "sft": {
        **{"model.learning_rate=-1": "-1.0: give 0 or more", "model.learning_rate=.nan": "nan: give 0 or more"},
        **{"model.weight_decay=-1": "-1.0: give 0 or more", "model.adam_epsilon=-1": "-1.0: give 0 or more"},
        "model.adam_beta1=1": "1.0: give a number from 0 up to (not including) 1",
        "model.adam_beta2=-1": "-1.0: give a number from 0 up to (not including) 1",
        "model.warmup_ratio=1": f"1.0: give {SHARE}",
        "model.min_lr_ratio=2": "2.0: give a share from 0 to 1",
        "model.max_grad_norm=-1": "-1.0: give a norm, or 0 for no clipping",
        "model.dropout=1": "1.0: give a probability from 0 up to (not including) 1",
        **{"data.batch_size=0": "0: give at least 1", "data.eval_batch_size=0": "0: give at least 1"},
        **{"data.max_length=0": "0: give at least 1", "data.val_fraction=1": f"1.0: give {SHARE}"},
        "trainer.max_steps=0": "0: nothing would be trained, give at least 1",
        "trainer.max_epochs=0": "0: nothing would be trained, give at least 1",
        "trainer.accumulate_grad_batches=0": "0: give at least 1",
        "trainer.log_every_n_steps=0": "0: give at least 1",
        "trainer.val_check_interval=0": "0: give batches, or a share of the epoch above 0",
        "trainer.check_val_every_n_epoch=0": "0: give at least 1",
        "run.checkpoint_every=0": "0: give at least 1",
        "run.keep_every=-1": "-1: give a number of steps, or 0 to keep none",
    },
    "reward": {
        "model.label_smoothing=0.5": "0.5: give a probability from 0 to below 0.5",
        "model.center_rewards_coefficient=-1": "-1.0: give 0 or more",
    },
    "ppo": {
        **{"model.iterations=0": "0: give at least 1", "model.num_ppo_epochs=0": "0: give at least 1"},
        **{"model.num_mini_batches=0": "0: give at least 1", "model.micro_batch_size=0": "0: give at least 1"},
        **{"model.samples_per_prompt=0": "0: give at least 1", "model.ptx_batch_size=0": "0: give at least 1"},
        "model.rollout_batch_size=0": "0: give at least 1",
        "model.eval_every=-1": "-1: give a number of iterations, or 0 for never",
        "model.stop_at_kl=0": "0.0: give a KL above 0 in nats, or null",
        **{"model.value_lr=-1": "-1.0: give 0 or more", "model.kl_coef=-1": "-1.0: give 0 or more"},
        **{"model.vf_coef=-1": "-1.0: give 0 or more", "model.entropy_coef=-1": "-1.0: give 0 or more"},
        **{"model.ptx_coef=-1": "-1.0: give 0 or more", "model.kl_horizon=0": "0: give at least 1 episode"},
        "model.kl_target=0": "0.0: give a KL above 0 in nats",
        **{"model.cliprange=0": "0.0: give a number above 0", "model.cliprange_value=0": "0.0: give a number above 0"},
        "model.dual_clip=1.1": "1.1: give 0, or more than 1.2",
        **{"model.gamma=2": "2.0: give a number from 0 to 1", "model.lam=-1": "-1.0: give a number from 0 to 1"},
        "model.score_clip=-1": "-1.0: give a number above 0, or 0 for no clipping",
        "model.target_kl_update=0": "0.0: give a KL above 0",
        "model.missing_eos_penalty=0": "0.0: it is subtracted, so give one above 0",
        "model.max_new_tokens=0": "0: must be at least 1",
        "model.temperature=0": "0.0: must be above 0",
        **{
            "model.top_k=-1": "-1: must be 0 (all tokens) or more",
            "model.top_p=2": "2.0: must be above 0 and at most 1",
        },
        "model.min_p=1": "1.0: must be at least 0 and below 1",
    },
}


@pytest.mark.parametrize("config", RANGES)
def test_numbers_out_of_range(desk: Any, config: str) -> None:
    sampling = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    for option, rest in RANGES[config].items():
        name = option.split("=")[0]
        shown = f"sampling: {name.removeprefix('model.')}" if name.endswith(sampling) else name
        line = desk.refused(*desk.fit_words(config), "--run.name=new", f"--{option}")
        assert line == f"{shown} is {rest}"


def test_a_configuration_that_is_not_yaml(scratch: Any) -> None:
    scratch.write("bad.yaml", "model: [1")
    assert scratch.refused("fit", "--config=bad.yaml").startswith("bad.yaml is not valid YAML: while parsing a flow")
    for content in ("", "- 1\n"):
        scratch.write("list.yaml", content)
        assert scratch.refused("fit", "--config=list.yaml") == (
            "list.yaml is no configuration: it must be a mapping, with keys model, data and so on"
        )


DATA = "{class_path: SFTDataModule, init_args: {path: sft.jsonl}}"
CONFIGURATIONS = {
    "stages: {sft: {config: sft.yaml}}": "bad.yaml is a pipeline: give it to the command pipeline",
    "architecture: llama": "bad.yaml is an architecture: give it as --model.model",
    f"{{model: 3, data: {DATA}}}": "model must be a class, or a mapping with class_path and init_args",
    f"{{model: {{class_path: SFTModule, learning_rate: 1}}, data: {DATA}}}": "model has options beside "
    "class_path: they belong under model.init_args",
    f"{{model: {{init_args: {{model: runs/sft}}}}, data: {DATA}}}": "model.class_path is missing: give one of",
    f"{{modle: {{class_path: SFTModule}}, data: {DATA}}}": "unknown option modle.class_path",
}


@pytest.mark.parametrize("content", CONFIGURATIONS)
def test_configurations(scratch: Any, content: str) -> None:
    scratch.write("bad.yaml", content)
    assert scratch.refused("fit", "--config", "bad.yaml").startswith(CONFIGURATIONS[content])


def test_nothing_given(desk: Any) -> None:
    said = desk.refused("fit")  # other tests of this process may have made subclasses, which are listed too
    assert said.startswith("no model is given: give --config FILE, or --model with one of ")
    assert "SFTModule" in said
    assert desk.refused("fit", "--model=SFTModule", "--data=SFTDataModule", "--data.path=playground") == (
        "SFTModule needs model.model"
    )
