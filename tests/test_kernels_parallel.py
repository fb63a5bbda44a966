"""The operations inside modules that are replicated (DDP) or sharded (FSDP2) over two processes."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import align_kernels as K
from align_kernels import few_logits

ROWS, WIDTH, VOCABULARY = 12, 8, 37


class Scored(nn.Module):
    """A layer below, and an output layer whose forward is K2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Linear(WIDTH, WIDTH)
        self.head = LogProbHead()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.head(torch.tanh(self.below(x)), labels)


class LogProbHead(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, VOCABULARY)

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        stats = K.linear_token_logprobs(hidden, self.weight, labels, bias=self.bias, entropy=True)
        assert stats.entropy is not None
        return stats.logp - 0.1 * stats.entropy


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, WIDTH, generator=generator), torch.randint(VOCABULARY, (ROWS,), generator=generator)


def replicated(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def sharded(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (2,))
    fully_shard(model.head, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        grad = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def _rank(rank: int, folder: str, wrap: Callable[[nn.Module], nn.Module], few: int) -> None:
    try:
        store = dist.FileStore(f"{folder}/store", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
        torch.set_num_threads(1)
        few_logits.FEW_LOGITS = few
        x, labels = batch()
        whole = Scored()
        whole(x, labels).mean().backward()
        mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
        model = wrap(Scored())
        model(x[mine], labels[mine]).mean().backward()
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, gradients(whole)[name], rtol=1e-5, atol=1e-6)
        dist.destroy_process_group()
        Path(folder, f"done{rank}").touch()
    except BaseException:
        Path(folder, f"failed{rank}").write_text(traceback.format_exc())
    os._exit(0)  # Gloo's destructor, called by what still refers to the group, now and then waits for ever


@pytest.mark.parametrize("few", [few_logits.FEW_LOGITS, 0], ids=["few", "chunks"])
@pytest.mark.parametrize("wrap", [replicated, sharded])
def test_two_processes_have_the_gradients_of_one(
    wrap: Callable[[nn.Module], nn.Module], few: int, tmp_path: Path
) -> None:
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path), wrap, few)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    problems = [path.read_text() for path in tmp_path.glob("failed*")]
    assert not problems, problems[0]
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}
