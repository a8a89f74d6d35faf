"""Calls that name kept tensors: as inputs, as outputs that are to be kept, or to fetch them and let them go.

Functions of a channel's kept tensors, its client's mapped segment, and the call. None of these calls is remembered: it would outlive what it names.
"""

from __future__ import annotations

import torch

from shmbroker.errors import BadFrame, BadInput
from shmbroker.lane.frame_layout import KEPT_OP
from shmbroker.lane.submission_reader import Descriptor, Submission
from shmbroker.memory.layout import Space
from shmbroker.worker.kept_tensors import KeptTensors
from shmbroker.worker.mapped_segment import MappedSegment
from shmbroker.worker.ops import BoundOp, OpDefinition, Static
from shmbroker.worker.prepared_call import PreparedCall


def with_kept(kept: KeptTensors, mapped: MappedSegment, call: Submission, op: BoundOp, arguments: Static, *, single: bool) -> PreparedCall:
    """A call of ``op`` with inputs that are kept here, or outputs that are to be. Raises :class:`BadFrame`.

    An output is kept once the op has returned: a call that fails keeps nothing.
    """
    new = [place for place in call.outputs if place.form.space == Space.KEPT]
    try:
        inputs = [input_of(kept, mapped, place) for place in call.inputs]
        kept.check_new((place.offset, place.form.spec) for place in new)
    except BadInput as error:
        raise BadFrame(str(error)) from None
    made = {place.offset: mapped.memory.empty(place.form.spec) for place in new}
    outputs = [made[place.offset] if place.form.space == Space.KEPT else mapped.view(place) for place in call.outputs]
    prepared = PreparedCall(op, inputs, outputs, arguments, single=single, repeatable=False)
    run = prepared.run

    def run_and_keep() -> object:
        launched = run()
        kept.add(made)
        return launched

    prepared.run = run_and_keep
    return prepared


def input_of(kept: KeptTensors, mapped: MappedSegment, place: Descriptor) -> torch.Tensor:
    """The tensor that an input's descriptor names, wherever it lies. Raises :class:`BadInput` when it is not kept here."""
    if place.form.space == Space.KEPT:
        return kept.find(place.offset, place.form.spec)
    return mapped.view(place)


def about_kept(kept: KeptTensors, mapped: MappedSegment, call: Submission) -> PreparedCall:
    """A call of op id :data:`KEPT_OP`: copies kept tensors to the outputs of their places, or, without outputs, lets them go now.

    Raises :class:`BadFrame`.
    """
    if any(place.form.space != Space.KEPT for place in call.inputs) or any(place.form.space == Space.KEPT for place in call.outputs):
        raise BadFrame(f"op id {KEPT_OP} copies from kept tensors, or lets them go, and nothing else")
    if not call.outputs:
        for place in call.inputs:
            kept.let_go(place.offset)
        return PreparedCall(_FETCH, (), (), {}, single=False, repeatable=False)
    if [place.form.spec for place in call.inputs] != [place.form.spec for place in call.outputs]:
        raise BadFrame(f"op id {KEPT_OP} copies each input to an output of its form")
    try:
        inputs = [input_of(kept, mapped, place) for place in call.inputs]
    except BadInput as error:
        raise BadFrame(str(error)) from None
    return PreparedCall(_FETCH, inputs, [mapped.view(place) for place in call.outputs], {}, single=False, repeatable=False)


def _copy_all(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each input, to be copied to the output of its place."""
    return inputs


_FETCH = OpDefinition("fetch", _copy_all).bind({}, {})
