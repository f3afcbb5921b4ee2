"""What MatchNeurons would need is known, and refused by its field, before anything is kept."""

from dataclasses import replace

import pytest
import torch
from engine_runs import loaded

from patchclamp_server.analysis.corpora.windows import ListedCorpus
from patchclamp_server.analysis.neurons.match import Forwards, Matching
from patchclamp_server.analysis.neurons.texts import TextSource
from patchclamp_server.artifacts.corpora import Document
from patchclamp_server.artifacts.neuron_sets import Neuron, NeuronSelection
from patchclamp_server.errors import InvalidArgument

INFO = replace(loaded("llama").info, d_ff=14_336, n_layers=32, context_length=1 << 17)
FEW = NeuronSelection((Neuron(3, 5),))


def refused(chosen: dict[int, torch.Tensor], *, other_layers: int = 32, window: int = 64, **fields: object) -> str:
    source = TextSource(ListedCorpus([Document((3, 4))]), window)
    job = Matching("other", "", source, **{"neurons": None, "layers": tuple(chosen), **fields})
    with pytest.raises(InvalidArgument) as caught:
        Forwards(chosen, INFO, replace(INFO, n_layers=other_layers), job)
    return caught.value.field


def test_sums_that_do_not_fit_are_refused_by_what_makes_them_large() -> None:
    assert refused({layer: torch.arange(14_336) for layer in range(4)}) == "layers"
    many = {3: torch.arange(1000)}
    assert refused(many, neurons=FEW, any_layer=True) == "neurons"


def test_rows_that_do_not_fit_are_refused_by_the_window() -> None:
    assert refused({3: torch.tensor([5])}, neurons=FEW, any_layer=True, window=1 << 14) == "texts.window_tokens"


def test_a_layer_that_the_other_model_lacks_is_refused_unless_all_are_looked_in() -> None:
    assert refused({3: torch.tensor([5])}, other_layers=3, neurons=FEW) == "neurons"
    assert refused({3: torch.arange(14_336)}, other_layers=3) == "layers"
