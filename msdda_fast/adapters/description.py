# SPDX-License-Identifier: Apache-2.0
"""What diffusers and peft write down beside an adapter's factors: how much each update counts.

A description comes from a stranger and would be peft's configuration, which may rewrite the base
(`init_lora_weights="pissa"`) or match modules by regular expressions that never end. So none of it
reaches peft. Rank, alpha and rsLoRA are read here, module by module; whatever else would change
what an adapter does is refused by name, and the rest is how it was trained.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msdda_fast.errors import InvalidAdapter
from msdda_fast.files import read_json, unique_keys

__all__ = ["Description", "in_header", "of_peft"]

#: Key of the description in the header of a file that diffusers saved.
_HEADER = "lora_adapter_metadata"
#: Initial values of the factors that leave the base as it is. With the others (PiSSA, OLoRA, CorDA,
#: LoftQ, ...) factors are relative to a base that peft changes.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
#: What peft's layers would do beside adding s B A.
_NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
)
#: Below it integers, which have any length in JSON, and products of two numbers are floats.
_MAX_NUMBER = 1e150
#: A module's name, or the end of one. As a regular expression, which peft takes it for, it may be
#: anchored (diffusers writes `^`) and its dots escaped.
_NAME = re.compile(r"\^?((?:\w|\\?\.|-)+)\$?")


@dataclass(frozen=True, slots=True)
class Description:
    """The description of an adapter in one network.

    Attributes:
        origin: Where it stands, for messages.
        fields: As written.
    """

    origin: str
    fields: Mapping[str, Any]

    def alphas(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return alpha by module, so that its update is B A alpha / rank.

        Args:
            ranks: Rank by module, as its factors have it.

        Raises:
            InvalidAdapter: It is not plain LoRA, a field has no such meaning, or ranks differ.
        """
        self._check_plain()
        rank_of = self._pattern("rank_pattern", ranks)
        alpha_of = self._pattern("alpha_pattern", ranks)
        rank, alpha = self._number("r", None), self._number("lora_alpha", 8)  # peft's own default
        alphas = {}
        for path, actual in ranks.items():
            described = rank_of.get(path, rank)
            if described is not None and described != actual:
                raise self._error(f"it has rank {described:g} in {path!r}, its factors {actual}")
            own = alpha_of.get(path, alpha)
            if own is None:
                raise self._error("lora_alpha is null; it must be a finite number")
            alphas[path] = own * math.sqrt(actual) if self.fields.get("use_rslora") else own
        return alphas

    def _check_plain(self) -> None:
        kind = self.fields.get("peft_type") or "LORA"
        if str(kind).rpartition(".")[2] != "LORA":
            raise self._error(f"it is of peft's type {kind}, which is not supported; use LORA")
        start = self.fields.get("init_lora_weights")
        if start not in _PLAIN_STARTS:
            raise self._error(
                f"it was trained with init_lora_weights={start!r}, so its factors are relative to "
                "a base that peft changes; save it as plain LoRA (peft's save_pretrained with "
                "path_initial_model_for_weight_conversion)"
            )
        for field in _NOT_PLAIN:
            if self.fields.get(field):
                raise self._error(f"it sets {field}, which is not supported; use plain LoRA")

    def _pattern(self, field: str, paths: Iterable[str]) -> dict[str, float]:
        """Return the entries of a pattern by module: the first whose name a module's path ends in.

        Raises:
            InvalidAdapter: A key is a regular expression.
        """
        pattern = self.fields.get(field) or {}
        if not isinstance(pattern, Mapping):
            raise self._error(f"{field} is no object: {pattern!r:.80}")
        entries: dict[str, tuple[int, float]] = {}  # `^` at the start: the whole path
        for place, key in enumerate(pattern):
            match = _NAME.fullmatch(key)
            if match is None:
                raise self._error(
                    f"{field} has {key!r:.80}, a regular expression; only names of modules are "
                    "supported"
                )
            name = ("^" if key.startswith("^") else "") + match[1].replace("\\", "")
            number = self._checked(f"{field} of {key!r:.80}", pattern[key])
            entries.setdefault(name, (place, number))
        found = {}
        for path in paths:
            parts = path.split(".")
            names = ["^" + path, *(".".join(parts[start:]) for start in range(len(parts)))]
            if matching := [entries[name] for name in names if name in entries]:
                found[path] = min(matching)[1]
        return found

    def _number(self, field: str, default: float | None) -> float | None:
        value = self.fields.get(field, default)
        return None if value is None else self._checked(field, value)

    def _checked(self, field: str, value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if -_MAX_NUMBER < value < _MAX_NUMBER:
                return float(value)
        raise self._error(f"{field} must be a finite number, got {value!r:.80}")

    def _error(self, text: str) -> InvalidAdapter:
        return InvalidAdapter(f"{self.origin}: {text}")


def in_header(
    header: Mapping[str, str], networks: Sequence[str], default: str
) -> dict[str, Description] | None:
    """Return the descriptions in a file's header by network; None: it has none.

    Args:
        header: The entries of the header.
        networks: Names of networks.
        default: The network that fields without the name of one describe.

    Raises:
        InvalidAdapter: They are damaged.
    """
    if _HEADER not in header:
        return None
    try:
        fields = json.loads(header[_HEADER], object_pairs_hook=unique_keys)
        if not isinstance(fields, dict):
            raise ValueError(f"expected an object, got {fields!r:.80}")
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"its {_HEADER} is not JSON: {error}") from error
    found: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        network, _, field = key.partition(".")
        if network not in networks:
            network, field = default, key
        found.setdefault(network, {})[field] = value
    return {n: Description(f"its {_HEADER}", entry) for n, entry in found.items()} or None


def of_peft(file: Path, network: str) -> dict[str, Description] | None:
    """Return the description that peft writes beside `file`; None: it is not there.

    Raises:
        InvalidAdapter: It is damaged.
    """
    beside = file.parent / "adapter_config.json"
    if not beside.is_file():
        return None
    try:
        return {network: Description(beside.name, read_json(beside, "a description of an adapter"))}
    except ValueError as error:
        raise InvalidAdapter(str(error)) from error
