"""A middleware that does nothing, dearly: in the gate's own tests, a change that costs too much."""

from __future__ import annotations

from dataclasses import dataclass, field

from beacon_proxy.contracts import Exchange

OPCODES_A_TURN = 3  # FOR_ITER, STORE_FAST, JUMP_BACKWARD


@dataclass(slots=True)
class Dear:
    """Call a function, and turn a loop, for nothing."""

    calls: int = field(default=0, metadata={"help": "calls an exchange"})
    turns: int = field(default=0, metadata={"help": "turns of a loop an exchange"})

    def prepare(self, exchange: Exchange) -> None:
        for _ in range(self.calls):
            _nothing()
        for _ in range(self.turns):
            pass


def _nothing() -> None:
    pass
