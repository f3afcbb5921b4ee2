"""Correlations from sums, against numpy."""

import numpy as np
import pytest
import torch

from patchclamp_server.analysis.neurons.correlation_sums import CorrelationSums
from patchclamp_server.engine.exclusive import at_once

FIRST, SECOND = {0: 5, 1: 7}, {0: 4, 2: 6}
PAIRS = [(0, 0), (0, 2), (1, 0), (1, 2)]
LENGTHS = (9, 1, 14, 3)


def texts(units: dict[int, int], seed: int) -> list[dict[int, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    # Means far larger than the deviations.
    return [{layer: 300 + torch.randn(t, n, generator=generator) for layer, n in units.items()} for t in LENGTHS]


def summed(first: list[dict[int, torch.Tensor]], second: list[dict[int, torch.Tensor]]) -> CorrelationSums:
    sums = CorrelationSums(PAIRS, FIRST, SECOND, torch.device("cpu"), controls=True)
    for x, y in zip(first, second, strict=True):
        n = len(x[0])
        # A row costs 3 products: slices are of one unit.
        at_once(sums.add(x, y, torch.arange(n).flip(0), 3.0))
    return sums


@pytest.mark.parametrize("control", [False, True])
def test_the_best_correlations_are_those_of_numpy(control: bool) -> None:
    first, second = texts(FIRST, 0), texts(SECOND, 1)
    sums = summed(first, second)
    assert sums.rows == sum(LENGTHS)
    x = {layer: torch.cat([text[layer] for text in first]).double().numpy() for layer in FIRST}
    rows = [{layer: of.flip(0) if control else of for layer, of in text.items()} for text in second]
    y = {layer: torch.cat([text[layer] for text in rows]).double().numpy() for layer in SECOND}
    for layer, n in FIRST.items():
        r = np.concatenate([np.corrcoef(x[layer].T, y[k].T)[:n, n:] for k in SECOND], axis=1)
        found = sums.best(layer, control=control)
        np.testing.assert_allclose(found.correlation.numpy(), r.max(1), atol=1e-5)
        flat = r.argmax(1)
        assert found.layer.tolist() == [0 if i < SECOND[0] else 2 for i in flat]
        assert found.column.tolist() == [i if i < SECOND[0] else i - SECOND[0] for i in flat]


def test_the_best_of_the_second_model_are_sought_in_the_first() -> None:
    first, second = texts(FIRST, 0), texts(SECOND, 1)
    found = summed(first, second).best_of_second(2)
    x = np.concatenate([torch.cat([text[layer] for text in first]).double().numpy() for layer in FIRST], axis=1)
    y = torch.cat([text[2] for text in second]).double().numpy()
    r = np.corrcoef(x.T, y.T)[:12, 12:]
    np.testing.assert_allclose(found.correlation.numpy(), r.max(0), atol=1e-5)
    assert [5 * layer + column for layer, column in zip(found.layer, found.column, strict=True)] == r.argmax(0).tolist()


def test_a_unit_that_never_changes_has_no_correlation() -> None:
    first, second = texts(FIRST, 0), texts(SECOND, 1)
    for text in first:
        text[0][:, 2] = 0.3
    for text in second:
        text[0][:], text[2][:] = 0.7, 0.0
    assert (summed(first, second).best(0).correlation == -torch.inf).all()
    assert summed(first, texts(SECOND, 1)).best(0).correlation[2] == -torch.inf
