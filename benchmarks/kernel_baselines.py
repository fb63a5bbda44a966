"""What the kernels are measured against: the same operations as one would write them, and as others ship them."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Variant = Callable[..., tuple[Tensor, ...]]


# ------------------------------------------------------------------ from logits and from hidden states
def token_stats(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob of each label and entropy, in float32."""
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def linear_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-prob of each label from hidden states."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def torch_linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same by PyTorch's own function."""
    return -F.linear_cross_entropy(hidden, weight, labels, reduction="none")


def liger_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same by Liger's fused loss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight, hidden, labels)


def cce_logp(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same by cut cross-entropy."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, labels, reduction="none")


def policy_loss(hidden: Tensor, weight: Tensor, labels: Tensor, old_logp: Tensor, advantages: Tensor) -> Tensor:
    """PPO's clipped loss, ε = 0.2, mean over all tokens; and what every trainer logs with it, as ours does."""
    log_p = F.linear(hidden, weight).float().log_softmax(-1)
    logp = log_p.gather(-1, labels[:, None])[:, 0]
    ratio = (logp - old_logp).exp()
    with torch.no_grad():
        policy_metrics(log_p, logp, old_logp, ratio, advantages)
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def policy_metrics(
    log_p: Tensor, logp: Tensor, old_logp: Tensor, ratio: Tensor, advantages: Tensor
) -> tuple[Tensor, ...]:
    """Entropy of each token, how many ratios either clip catches, and the approximate KL."""
    entropy = -(log_p.exp() * log_p).sum(-1)
    low, high = (ratio < 0.8) & (advantages < 0), (ratio > 1.2) & (advantages > 0)
    return entropy, low.sum(), high.sum(), ((logp - old_logp) ** 2).mean() / 2


def preference_logps(hidden: Tensor, weight: Tensor, labels: Tensor, seq_ids: Tensor, num_seqs: int) -> Tensor:
    """Summed log-prob of each sequence."""
    return hidden.new_zeros(num_seqs, dtype=torch.float32).index_add(0, seq_ids, linear_logp(hidden, weight, labels))


# ------------------------------------------------------------------ scans
def gae_loop(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """The recursion as most libraries write it: a Python loop over time, masked tokens passed over."""
    batch, length = rewards.shape
    running, following = rewards.new_zeros(batch), rewards.new_zeros(batch)
    columns = []
    for t in reversed(range(length)):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(valid, delta + gamma * lam * running, running)
        following = torch.where(valid, values[:, t], following)
        columns.append(torch.where(valid, running, 0.0))
    advantages = torch.stack(columns[::-1], 1)
    return advantages, torch.where(mask, advantages + values, 0.0)


def gae_doubling(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """By pointer doubling, log₂ T rounds: the usual formulation in tensor operations."""
    length = rewards.shape[1]
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    position = torch.where(mask, torch.arange(length, device=mask.device), length)
    upcoming = position.flip(1).cummin(1).values.flip(1)
    following = F.pad(values, (0, 1)).gather(1, F.pad(upcoming[:, 1:], (0, 1), value=length))
    total = torch.where(mask, rewards + gamma * following - values, 0.0)
    decay = torch.where(mask, gamma * lam, 1.0).to(total.dtype)
    step = 1
    while step < length:
        total = total + F.pad(decay[:, :-step] * total[:, step:], (0, step))
        decay = F.pad(decay[:, :-step] * decay[:, step:], (0, step))
        step *= 2
    advantages = torch.where(mask, total, 0.0)
    return advantages, advantages + values


def gae_triangular(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """By a triangular matrix of powers inside blocks of 64 tokens; knows no masked token but at the ends of a row."""
    batch, length = rewards.shape
    short = -length % 64
    rewards, values = (F.pad(x.where(mask, 0.0), (0, short)) for x in (rewards, values))
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    blocks = delta.view(batch, -1, 64)
    power = torch.arange(64, device=mask.device)
    matrix = ((gamma * lam) ** (power[:, None] - power).clamp(min=0).double()).to(delta.dtype).tril()
    within = blocks @ matrix
    carry, carries = rewards.new_zeros(batch), []
    for block in reversed(range(blocks.shape[1])):
        carries.append(carry)
        carry = within[:, block, 0] + (gamma * lam) ** 64 * carry
    reach = ((gamma * lam) ** (64 - power).double()).to(delta.dtype)
    total = (within + torch.stack(carries[::-1], 1)[..., None] * reach).reshape(batch, -1)
    advantages = total[:, :length].where(mask, 0.0)
    return advantages, advantages + values[:, :length]


def shaped(
    logp: Tensor,
    ref_logp: Tensor,
    values: Tensor,
    scores: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """KL reward, score, GAE and whitening, one after the other; advantages and returns."""
    kl = (logp - ref_logp).where(mask, 0.0)
    later = mask.flip(1).cumsum(1).flip(1)
    rewards = -kl_coef * kl + torch.where(mask & (later == 1), scores[:, None], 0.0)
    advantages, returns = gae_doubling(rewards, values, mask, gamma, lam)
    count = mask.sum()
    mean = advantages.sum() / count
    var = torch.where(mask, advantages - mean, 0.0).square().sum() / count
    return torch.where(mask, (advantages - mean) * torch.rsqrt(var + 1e-8), 0.0), returns


# ------------------------------------------------------------------ as variants of a case
def single(call: Callable[..., Tensor]) -> Variant:
    """A function of one output."""

    def wrapped(**inputs: Tensor) -> tuple[Tensor, ...]:
        return (call(**inputs),)

    return wrapped


def other(module: str, call: Callable[..., Tensor]) -> Variant | str:
    """A function that needs another package, or that it is absent."""
    return single(call) if importlib.util.find_spec(module) is not None else f"{module} is not installed"


def compiled(call: Variant) -> Variant:
    """``call`` through torch.compile."""
    function: Any = torch.compile(call, dynamic=False)
    return function
