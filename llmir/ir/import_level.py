"""How much of a model a module shows, and so a plan was made from."""

from __future__ import annotations

from typing import Literal

#: Every layer an op of the dialect; some of them opaque; or nothing but the attention layers.
ImportLevel = Literal["full", "open", "attention"]
