"""The key-value cache against a plain dictionary of slots."""

import pytest
import torch
from torch import Tensor

from lightning_align.rollout import cache as cache_module
from lightning_align.rollout.cache import KVCache

LAYERS, HEADS, DIM, ROWS = 2, 3, 4, 5


@pytest.fixture
def cache() -> KVCache:
    return KVCache(LAYERS, HEADS, DIM, rows=ROWS, capacity=90, like=torch.empty(0))


def random_rows(rows: int, slots: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, slots, 2, HEADS, DIM, generator=torch.Generator().manual_seed(seed))


def content(cache: KVCache, layer: int, row: int, slots: int) -> Tensor:
    """The first slots of a row as they went in, [slots, 2, K, D]."""
    heads = [part.view(-1, HEADS, cache.slots, DIM)[row, :, :slots] for part in cache.read(layer, ROWS)]
    return torch.stack(heads).permute(2, 0, 1, 3)


@pytest.mark.parametrize("chunk", [1, 500, 2**20])
def test_growing_keeps_what_is_there_and_clears_the_rest(
    cache: KVCache, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "CHUNK_BYTES", chunk)
    cache.storage.fill_(torch.nan)  # what memory may hold
    rows = [random_rows(ROWS, 10, seed=layer) for layer in range(LAYERS)]
    cache.reserve(10)
    for layer in range(LAYERS):
        cache.fill(layer, 0, rows[layer], 1)
    for slots in (11, 16, 17, 40, 90):
        cache.reserve(slots)
        assert slots <= cache.slots <= 90
        for layer in range(LAYERS):
            for row in range(ROWS):
                assert torch.equal(content(cache, layer, row, 10), rows[layer][row])
                assert bool((content(cache, layer, row, cache.slots)[16:] == 0).all())


def test_the_cache_never_shrinks_nor_exceeds_its_capacity(cache: KVCache) -> None:
    cache.reserve(30)
    before = cache.slots
    cache.reserve(3)
    assert cache.slots == before
    cache.reserve(89)
    assert cache.slots == 90


def test_prompts_go_to_all_their_rows_and_tokens_behind_them(cache: KVCache) -> None:
    prompts, tokens = random_rows(2, 6), random_rows(ROWS, 1, seed=1)
    positions = torch.tensor([2, 2, 5, 6, 0])
    cache.reserve(7)
    cache.fill(1, 1, prompts, 2)
    index = (cache.first_slot + positions[:, None]).reshape(-1)
    cache.write(1, index, tokens.view(ROWS, 2 * HEADS, DIM))
    for row in range(ROWS):
        expected = torch.zeros(7, 2, HEADS, DIM)
        if row > 0:
            expected[:6] = prompts[(row - 1) // 2]
        expected[positions[row]] = tokens[row, 0]
        assert torch.equal(content(cache, 1, row, 7), expected)
    assert bool((cache.layers[0] == 0).all())


def test_moved_rows_replace_others_in_every_layer(cache: KVCache) -> None:
    rows = random_rows(ROWS, 8)
    cache.reserve(8)
    for layer in range(LAYERS):
        cache.fill(layer, 0, rows + layer, 1)
    cache.move(torch.tensor([4, 3]), torch.tensor([0, 2]))
    for layer in range(LAYERS):
        for row, source in enumerate([4, 1, 3, 3, 4]):
            assert torch.equal(content(cache, layer, row, 8), rows[source] + layer)
