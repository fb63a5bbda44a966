"""``doctor``: versions, devices, missing extras, which kernels run, and a self-test of what everything stands on."""

import importlib.util
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from lightning_align.cli.options import OptionParser
from lightning_align.run.environment import versions

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

EXTRAS = {
    "triton": ("gpu", "fused GPU kernels"),
    "bitsandbytes": ("bnb", "8-bit optimisers"),
    "trl": ("parity", "parity tests against TRL"),
    "pytest": ("dev", "the tests"),
}
CPU_FEATURES = {
    "avx2": "fast float32",
    "avx512f": "faster float32",
    "avx512_bf16": "bfloat16 arithmetic",
    "amx_bf16": "bfloat16 matrix products",
}


def main(argv: list[str]) -> int:
    """Print the report; exit code 1 if a self-test fails."""
    parser = OptionParser("doctor", "Versions, devices, extras, kernels and a self-test.")
    parser.add_argument("--no-test", dest="test", action="store_false", help="leave the self-test out")
    options = parser.parse_args(argv)
    for title, lines in (
        ("versions", _versions()),
        ("machine", _machine()),
        ("extras", _extras()),
        ("kernels", _kernels()),
    ):
        print(title)
        for line in lines:
            print(f"  {line}")
    return self_test() if options.test else 0


def _versions() -> list[str]:
    return [f"{name:<16}{version}" for name, version in versions().items()]


def _machine() -> list[str]:
    import torch

    flags = cpu_flags()
    memory = psutil.virtual_memory()
    lines = [
        f"system          {platform.system()} {platform.machine()}",
        f"cores           {os.cpu_count()} (torch uses {torch.get_num_threads()} threads)",
        f"memory          {memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB free",
        *(f"{name:<16}{'yes' if name in flags else 'no'} ({what})" for name, what in CPU_FEATURES.items()),
    ]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        lines.append(f"gpu {index}           {facts.name}, {facts.total_memory / 2**30:.1f} GiB")
    if not torch.cuda.is_available():
        lines.append("gpu             none that this torch can use")
    if not flags & {"avx512_bf16", "amx_bf16"} and not torch.cuda.is_available():
        lines.append("advice          keep model.dtype float32: bfloat16 is several times slower on this CPU")
    return lines


def cpu_flags() -> set[str]:
    """Feature flags of the CPU as Linux lists them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    lines = path.read_text(encoding="utf-8").splitlines()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _kernels() -> list[str]:
    """Which implementation of each operation runs here, and why no faster one does."""
    import torch

    import align_kernels
    from align_kernels import scan_compiled

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [f"{op:<23}{align_kernels.available_impls(op, device)[0]}" for op in align_kernels.OPERATIONS]
    if problem := align_kernels.why_not(align_kernels.OPERATIONS[0], "triton", device):
        lines.append(f"no triton: {problem}")
    if problem := scan_compiled.problem():
        lines.append(f"gae, shaped_advantages run as tensor operations, not as compiled C: {problem}")
    return lines


def _extras() -> list[str]:
    lines = []
    for module, (extra, purpose) in EXTRAS.items():
        state = "installed" if importlib.util.find_spec(module) else f"missing: pip install 'lightning-align[{extra}]'"
        lines.append(f"{module:<16}{state} ({purpose})")
    return lines


def self_test() -> int:
    """Run every check; returns the exit code."""
    print("self-test")
    failed = 0
    checks: tuple[tuple[str, Callable[[], float], float], ...] = (
        ("token log-probs", check_logprobs, 1e-4),
        ("rollout", check_rollout, 1e-3),
    )
    for name, check, limit in checks:
        difference = check()
        good = difference <= limit
        failed += not good
        print(f"  {name:<16}{'ok' if good else 'FAILED'} (largest difference {difference:.1e}, allowed {limit:.0e})")
    return 1 if failed else 0


def check_logprobs() -> float:
    """Largest difference between our log-probs and a plain log-softmax, on a small random model."""
    import torch

    from lightning_align.models.logprobs import token_stats

    model = small_model()
    ids = torch.randint(0, model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, :4] = False
    with torch.no_grad():
        ours = token_stats(model, ids, torch.ones_like(ids, dtype=torch.bool), mask=mask).logp
        plain = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    return float((ours[:, 1:] - plain * mask[:, 1:]).abs().max())


def check_rollout() -> float:
    """Largest difference between the sampler's log-probs and the training forward's, on the sampler's own tokens."""
    import torch

    from lightning_align.models.logprobs import token_stats
    from lightning_align.models.tokenizer_training import train_tokenizer
    from lightning_align.rollout.engine import build_engine
    from lightning_align.rollout.types import SamplingParams

    tokenizer = train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 8, vocab_size=64, algorithm="words")
    model = small_model(vocab_size=len(tokenizer))
    engine = build_engine("auto", model, tokenizer)
    params = SamplingParams(max_new_tokens=8, num_samples=2)
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the quick", "the lazy dog")]
    rollout = engine.generate(prompts, params, seeds=range(4))
    with torch.no_grad():
        stats = token_stats(model, rollout.input_ids, rollout.attention_mask, mask=rollout.completion_mask)
    return float((stats.logp - rollout.engine_logp)[rollout.completion_mask].abs().max())


def small_model(vocab_size: int = 64) -> "LlamaForCausalLM":
    """A random Llama of a few thousand parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        return LlamaForCausalLM(config).eval()
