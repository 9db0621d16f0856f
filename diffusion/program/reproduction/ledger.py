"""What has been measured so far, one file per measurement, so that an interrupted report goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...digest import digest
from ...models.files import parse_json, read_tensors, write_tensors
from ..output import say

RESULT, CONTENT = "result", "content"


@dataclass(frozen=True, eq=False)
class Measurement:
    """Plain facts, ready for JSON, and tensors by name."""

    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Ledger:
    """Measurements in a folder, each in a file named after all that it depends on.

    Attributes:
        folder: where the files are; created if need be.
        common: JSON-ready, what every measurement depends on: versions, device, threads.
    """

    folder: Path
    common: dict[str, Any]

    def place(self, name: str, settings: dict[str, Any]) -> Path:
        """Return the path, without suffix, of the measurement of that name and those settings."""
        text = json.dumps({**self.common, **settings}, sort_keys=True)
        return self.folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def once(self, name: str, settings: dict[str, Any], measure: Callable[[], Measurement]) -> Measurement:
        """Return the measurement of that name and those settings: what an earlier run kept, or else a new one."""
        path = self.place(name, settings).with_suffix(".safetensors")
        if path.is_file():
            try:
                tensors, header = read_tensors(path)
                facts = parse_json(header.get(RESULT, ""))
                if header.get(CONTENT) == _content(facts, tensors):
                    return Measurement(facts, tensors)
                say(f"deq-ddim: warning: {path} was changed, so that measurement is made again")
            except ValueError:
                say(f"deq-ddim: warning: {path} cannot be read, so that measurement is made again")
        say(f"measuring {name}")
        made = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.detach().cpu() for key, value in made.tensors.items()}
        facts = parse_json(json.dumps(made.facts))
        write_tensors(path, tensors, {RESULT: json.dumps(facts), CONTENT: _content(facts, tensors)})
        return Measurement(facts, tensors)


def _content(facts: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """What tells whether a part is missing or was changed."""
    return f"{digest([json.dumps(facts), tensors])}"
