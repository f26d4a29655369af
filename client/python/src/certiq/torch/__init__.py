"""Models of torch: recording calibrations, writing quantized weights back.

with certiq.torch.record(model, client) as recording:
    for batch in batches:
        model(**batch)
recording.apply(recording.quantize(certiq.Spec(bits=4)))
"""

from certiq.torch.experts import take_experts_apart
from certiq.torch.linears import find_linears, is_linear, set_weight, weight_of
from certiq.torch.record import RecordedGroup, Recording, RecordingError, record
from certiq.torch.taps import InputGroup, InputTap, SharedInputError

__all__ = [
    "InputGroup",
    "InputTap",
    "RecordedGroup",
    "Recording",
    "RecordingError",
    "SharedInputError",
    "find_linears",
    "is_linear",
    "record",
    "set_weight",
    "take_experts_apart",
    "weight_of",
]
