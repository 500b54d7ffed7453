"""The table of options and the constructors say the same."""

from __future__ import annotations

import inspect

import pytest
import torch

from fused_adamp import SGDP, AdamP
from fused_adamp.options import OPTIONS, options_of

EACH = pytest.mark.parametrize("cls", [AdamP, SGDP])


@EACH
def test_signature_and_table_have_the_same_options_and_defaults(cls: type[AdamP | SGDP]) -> None:
    _, *parameters = inspect.signature(cls).parameters.values()
    assert {p.name: p.default for p in parameters} == {n: o.default for n, o in options_of(cls.__name__).items()}


@EACH
def test_groups_have_the_options_alone(cls: type[AdamP | SGDP]) -> None:
    optimizer = cls([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.param_groups[0].keys() - {"params"} == options_of(cls.__name__).keys()


@EACH
def test_each_option_is_documented_once(cls: type[AdamP | SGDP]) -> None:
    lines = inspect.getdoc(cls).splitlines()
    for name in options_of(cls.__name__):
        assert sum(line.startswith(f"    {name}: ") for line in lines) == 1, name


@pytest.mark.parametrize("name", OPTIONS)
def test_defaults_are_allowed(name: str) -> None:
    OPTIONS[name].allowed.check(name, OPTIONS[name].default)
