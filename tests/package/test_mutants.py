"""The lists of mutants are of the code as it is. Which tests find them: ``make mutants``."""

from __future__ import annotations

import pytest
from cuda_mutants import MUTANTS as CUDA
from host_mutants import MUTANTS as HOST
from kernel_mutants import MUTANTS as KERNELS
from mutation import ROOT, Mutant


@pytest.mark.parametrize("mutant", [*HOST, *KERNELS, *CUDA], ids=lambda mutant: mutant.name)
def test_the_text_to_replace_is_there(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == mutant.times
    assert mutant.new != mutant.old


@pytest.mark.parametrize("mutants", [HOST, KERNELS, CUDA])
def test_names_tell_mutants_apart(mutants: tuple[Mutant, ...]) -> None:
    assert len({mutant.name for mutant in mutants}) == len(mutants)
