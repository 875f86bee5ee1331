"""A plan on its way: what the scheduler notes down while it builds one, and while one is in flight."""

from __future__ import annotations

from dataclasses import dataclass, field

from saddle.engine.request import Request
from saddle.protocol import RowAdmit, RowWork, StepPlan


@dataclass(slots=True)
class Flight:
    """A plan in flight, and whose it is.

    requests   whose work it is, in the order of `plan.work`
    ends       tokens of each that are computed once the plan ran
    published  blocks that the plan fills and that can be found already
    """

    plan: StepPlan
    requests: list[Request]
    ends: list[int]
    published: list[int]


@dataclass(slots=True)
class Draft:
    """A plan being built.

    budget     tokens that may still be given
    room_s     predicted time that prompts may still take; None: any
    may_admit  whether waiting requests may still get a row in this step
    The lists are those of the plan and of its flight.
    """

    step_id: int
    budget: int
    room_s: float | None = None
    may_admit: bool = True
    admits: list[RowAdmit] = field(default_factory=list)
    work: list[RowWork] = field(default_factory=list)
    masked_rows: list[int] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    published: list[int] = field(default_factory=list)

    def seal(self) -> Flight:
        plan = StepPlan(self.step_id, self.admits, self.work, self.masked_rows)
        return Flight(plan, self.requests, self.ends, self.published)
