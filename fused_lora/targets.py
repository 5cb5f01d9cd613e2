"""Which modules of a model a user names, and which entries of a pattern hold for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import nn

Targets = str | Collection[str] | Callable[[str, nn.Module], bool]


def named(model: nn.Module, target_modules: Targets) -> dict[str, nn.Module]:
    """The named modules by name, each once, whatever the number of its names."""
    names_it = _matcher(target_modules)
    found: dict[str, nn.Module] = {}
    seen, names = set(), []
    for name, module in model.named_modules(remove_duplicate=False):
        names.append(name)
        if id(module) not in seen and names_it(name, module):
            seen.add(id(module))
            found[name] = module
    if not isinstance(target_modules, str) and not callable(target_modules):
        for entry in target_modules:
            if not any(_ends_with(name, entry) for name in names):
                raise ValueError(f"target_modules has {entry!r}; expected the name, or its end, of a module of model.")
    if not found:
        raise ValueError(f"target_modules is {target_modules!r}; expected to name at least one module of model.")
    return found


def _matcher(target_modules: Targets) -> Callable[[str, nn.Module], bool]:
    if isinstance(target_modules, str):
        pattern = _compiled("target_modules", target_modules)
        return lambda name, module: pattern.fullmatch(name) is not None
    if callable(target_modules):
        return target_modules
    if not isinstance(target_modules, Collection) or not all(isinstance(entry, str) for entry in target_modules):
        raise TypeError(f"target_modules is {target_modules!r}; expected names, a regular expression or a function.")
    return lambda name, module: any(_ends_with(name, entry) for entry in target_modules)


def _ends_with(name: str, entry: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def by_name(argument: str, pattern: Mapping[str, Any], targets: Collection[str]) -> dict[str, Any]:
    """The value for each target that a key of the pattern matches; the first such key's."""
    values: dict[str, Any] = {}
    for key, value in pattern.items():
        expression = _compiled(argument, rf"(.*\.)?({key})$")
        matched = [name for name in targets if expression.match(name)]
        if not matched:
            raise ValueError(f"{argument} has {key!r}; expected to match the name, or its end, of a converted layer.")
        for name in matched:
            values.setdefault(name, value)
    return values


def _compiled(argument: str, expression: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ValueError(f"{argument} has {expression!r}; expected a regular expression: {error}.") from error
