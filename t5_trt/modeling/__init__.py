"""The classes that users import, and their parts: loading, forward, generate, devices, the fallback to Hugging Face."""

from transformers import PreTrainedModel

from t5_trt.modeling.t5 import (
    TRTMT5,
    TRTT5,
    TRTUMT5,
    TRTMT5Encoder,
    TRTT5Encoder,
    TRTT5EncoderModel,
    TRTT5ForConditionalGeneration,
    TRTUMT5Encoder,
)

# Users import the first two. The family classes are here because pipelines that diffusers saved before `modeling` was a package look them up here.
__all__ = [
    "TRTMT5",
    "TRTT5",
    "TRTUMT5",
    "PreTrainedModel",
    "TRTMT5Encoder",
    "TRTT5Encoder",
    "TRTT5EncoderModel",
    "TRTT5ForConditionalGeneration",
    "TRTUMT5Encoder",
]
