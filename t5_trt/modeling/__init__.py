"""The classes that users import, and what they are made of: loading, the forward pass, generation, devices, the fallback to Hugging Face."""

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

# Users import two of them. Pickles and diffusers' pipelines made before `modeling` was a package look for the others here.
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
